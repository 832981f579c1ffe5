"""Fitting one layer on values that are read a batch at a time.

What it computes is what `qjax.fit.layer` computes, and so are the codes. But it holds the values of
one batch, and of all batches nothing but sums, extremes and samples of bounded size.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit import moments as m
from qjax.fit.held_out import JointMoments, joint_moments, shrinkage_of
from qjax.fit.layer import (
    Corrected,
    Fit,
    Prepared,
    Rounded,
    channel_moments,
    channel_sums,
    energies,
    fit_output,
    goal_of,
    is_output_searched,
    raised_scales,
    round_kernel,
    with_rounded_bias,
)
from qjax.fit.memory import Store, Stored, batch_of, settled
from qjax.fit.ranges import (
    OutputValues,
    Task,
    activated,
    choose_input,
    extremes_of,
    output_values,
    project_batches,
    seen_by,
)
from qjax.fit.refit import by_group, lacking, residual_moments, shifted
from qjax.fit.sampling import MOMENT_PATCHES, patch_stride, sampled_patches
from qjax.formats.affine import QParams, magnitude
from qjax.formats.dynamic import ActivationFormat, dynamic
from qjax.graph.activation import NONE
from qjax.graph.fold import Folded, apply_folded
from qjax.objectives.base import Range
from qjax.programs import program
from qjax.rounding.metric import damped
from qjax.run.layer import QuantizedLayer, apply_linear, dequantized_bias, with_bias


class Given(NamedTuple):
    """What a layer is fitted on, see `qjax.fit.layer.Values`."""

    x_float: Stored
    x: Stored
    shortcut: tuple[Stored, Stored] | None


class FittedByBatch(NamedTuple):
    """What fitting a layer gives: its `Fit`, and what other steps read of it, see `Fitted`."""

    fit: Fit
    float_output: Stored
    output: Stored


def is_fitted_by_batch(task: Task, known: QParams | None) -> bool:
    """Whether no range needs all values of a layer at hand together."""
    inputs = task.recipe.inputs
    has_input_channels = (
        known is None
        and inputs is not None
        and (inputs.granularity == "per_channel" and bool(task.operation.input_axes))
    )
    return task.recipe.objective.per_channel and not (
        has_input_channels or task.has_output_channels
    )


def fit_layer_by_batch(
    task: Task, limits: Any, given: Given, folded: Folded, known: QParams | None, store: Store
) -> FittedByBatch:
    """Fits a layer; arguments as of `fit_layer`.

    Args:
      task: what to do.
      limits: of the widths.
      given: what it is fitted on.
      folded: its kernel and bias in float.
      known: the grid of codes that its input lies on already, None if there is none.
      store: keeps what is computed by batch.

    Raises:
      NeedsAllValuesError: its range objective makes histograms.
    """
    recipe = task.recipe
    inputs, input_clip = _fit_input(task, limits["inputs"], given.x, folded, known)
    z, moved, peaks, parts = store(partial(_float_output, task, folded), [given.x_float], 4)
    peak, output_moments = _greatest(peaks), _joined_moments(parts)
    others = [z, *(given.shortcut or ())]
    hessian = overfit = None
    if recipe.needs_moments:
        folded, hessian, overfit = _with_moments(task, inputs, given.x, others, folded)
    rounded = None
    if recipe.weights is not None:
        rounded = round_kernel(
            folded.kernel,
            hessian,
            limits["weights"],
            spec=recipe.weights,
            objective=recipe.objective,
            rounding=recipe.round_with,
            sweeps=recipe.sweeps,
            candidates=task.candidates,
        )
    prepared = Prepared(None, None, inputs, input_clip, folded, hessian)
    corrected = _corrected(task, given.x, others, prepared, rounded)
    added = None if given.shortcut is None else jnp.zeros(())  # tells that there is one
    outputs, output_clip = fit_output(task, limits["outputs"], None, corrected, added)
    layer = dataclasses.replace(corrected.layer, outputs=outputs)
    run = partial(_output, task, layer, peak)
    output, signal, noise = store(run, [given.x, z], 3)
    sums = tuple(jnp.concatenate([each[i] for i in range(len(each))]) for each in (signal, noise))
    weight = (jnp.inf, None) if rounded is None else (rounded.sqnr_db, rounded.clip)
    fit = Fit(layer, weight[0], (sums[0], sums[1]), weight[1], input_clip, output_clip)
    others = {"raised": corrected.raised, "overfit": overfit, "output_moments": output_moments}
    return FittedByBatch(fit._replace(**others), moved, output)


def _greatest(peaks: Stored) -> jax.Array:
    return jnp.max(jnp.stack([peaks[number] for number in range(len(peaks))]))


def _joined_moments(parts: Stored) -> jax.Array:
    """Mean and deviation of channels on all batches, from those on each."""
    means, deviations = jnp.stack([parts[number] for number in range(len(parts))], axis=1)
    variance = jnp.mean(jnp.square(deviations), axis=0) + jnp.var(means, axis=0)
    return jnp.stack([jnp.mean(means, axis=0), jnp.sqrt(variance)])


@program(static_argnums=0)
def _float_output(
    task: Task, folded: Folded, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """z, what is read of it, the greatest magnitude that its activation shows, its moments."""
    z = apply_folded(task.operation, folded, x)
    shown = activated(task.activation, task.movement, z[None])
    peak = jnp.max(jnp.abs(shown.astype(jnp.float32)), initial=0)
    return z, task.movement(z), peak, channel_moments(task.operation, z[None])


@program(static_argnums=0)
def _output(
    task: Task, layer: QuantizedLayer, peak: jax.Array, x: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A layer's output, and the energies of one batch."""
    y = _linear(task, layer, x)
    if layer.outputs is not None:
        y = project_batches(layer.outputs, y)
    shown, shown_hat = (activated(task.activation, task.movement, v) for v in (z[None], y))
    return task.movement(y[0]), *energies(shown, shown_hat, magnitude(peak))


def _linear(task: Task, layer: QuantizedLayer, x: jax.Array) -> jax.Array:
    """What a layer computes before its output is quantized, [1, ...]."""
    bare = dataclasses.replace(layer, outputs=None)
    return apply_linear(task.operation, bare, x.astype(jnp.float32))[None]


# ---- The input, and the kernel that suits it


def _fit_input(
    task: Task, limits: Any, x: Stored, folded: Folded, known: QParams | None
) -> tuple[ActivationFormat | None, jax.Array | None]:
    spec = task.recipe.inputs
    if spec is None:
        return None, None
    if spec.is_dynamic:
        return dynamic(spec, limits, task.examples and task.examples.input), None
    if known is not None:
        return known, jnp.ones((), jnp.float32)
    count = len(x)
    found = [settled(_sample_input(task, count, x[number])) for number in range(count)]
    extremes, patches = _joined([each[0] for each in found]), [each[1] for each in found]
    return choose_input(task, limits, extremes, jnp.concatenate(patches, axis=2), folded.kernel)


@program(static_argnums=(0, 1))
def _sample_input(task: Task, batches: int, x: jax.Array) -> tuple[Range, jax.Array]:
    x = x.astype(jnp.float32)[None]
    if task.recipe.objective.loss is None:
        return extremes_of(x), jnp.zeros((1, 1, 1), jnp.float32)
    return extremes_of(x), sampled_patches(task.operation, x, batches)


def _joined(extremes: Sequence[Range]) -> Range:
    low, high = zip(*extremes, strict=True)
    return jnp.min(jnp.stack(low)), jnp.max(jnp.stack(high))


def _with_moments(
    task: Task,
    inputs: ActivationFormat | None,
    x: Stored,
    others: Sequence[Stored],
    folded: Folded,
) -> tuple[Folded, jax.Array, jax.Array | None]:
    """The refitted kernel, the second moments of the quantized input's patches, the overfit."""
    recipe, operation, count = task.recipe, task.operation, len(x)
    peaks = [settled(_peak(inputs, x[number])) for number in range(count)]
    unit = magnitude(jnp.max(jnp.stack(peaks)))
    first = x[0]
    shape = jax.ShapeDtypeStruct((1, *first.shape), jnp.float32)
    stride = patch_stride(operation, shape, MOMENT_PATCHES, count)
    observer = m.moments(operation, stride)
    state = observer.init()
    for number in range(count):
        state = settled(_add_moments(task, stride, state, inputs, unit, x[number]))
    moments = _final_moments(recipe.bias_correction, state)
    activation = goal_of(task, jnp.zeros(()), _shortcut_of(others)).activation
    times = min(recipe.reconstructions, 1) if activation == NONE else recipe.reconstructions
    if not times:
        return folded, moments.hessian, None
    folded, shrunk, overfit = folded._replace(kernel=folded.kernel * unit), moments, None
    if task.has_few_images:
        joint = None
        for number in range(count):
            values = batch_of([x, *others], number)
            joint = settled(_add_joint(task, stride, folded, joint, inputs, unit, *values))
        shrunk, overfit = _shrunk(task, count, moments, joint)
    for _ in range(times):
        state = residual_moments(operation, stride, activation).init()
        for number in range(count):
            values = batch_of([x, *others], number)
            state = _add_residual(task, stride, folded, state, inputs, unit, *values)
            settled(state)
        folded = _refitted(recipe.bias_correction, folded, shrunk, state)
    return folded._replace(kernel=folded.kernel / unit), moments.hessian, overfit


def _shortcut_of(others: Sequence[Any]) -> Any:
    """Something where there is a shortcut after z, else None."""
    return (jnp.zeros(()), jnp.zeros(())) if len(others) > 1 else None


def _quantized(inputs: ActivationFormat | None, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)[None]
    return x if inputs is None else project_batches(inputs, x)


@program()
def _peak(inputs: ActivationFormat | None, x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(_quantized(inputs, x)))


@program(static_argnums=(0, 1))
def _add_moments(
    task: Task, stride: int, state: Any, inputs: Any, unit: jax.Array, x: jax.Array
) -> Any:
    seen = _quantized(inputs, x)[0] / unit
    return m.moments(task.operation, stride).update(state, seen)


@program(static_argnums=0)
def _final_moments(is_centered: bool, state: Any) -> m.Moments:
    found = m.mean_of(state)
    return m.centered(found) if is_centered else found


@program(static_argnums=(0, 1))
def _add_residual(
    task: Task,
    stride: int,
    folded: Folded,
    state: Any,
    inputs: Any,
    unit: jax.Array,
    x: jax.Array,
    z: jax.Array,
    *shortcut: jax.Array,
) -> Any:
    seen = _quantized(inputs, x)[0] / unit
    target, shortcuts = _wanted(z, shortcut)
    goal = goal_of(task, target, shortcuts)
    added = None if goal.shortcut is None else goal.shortcut[0]
    own = goal._replace(target=goal.target[0], shortcut=added)
    observer = residual_moments(task.operation, stride, own.activation)
    return observer.update(state, (seen, by_group(task.operation, folded, own, stride)))


def _wanted(
    z: jax.Array, shortcut: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """The output to be had and the shortcut, [1, ...] each; see `Prepared.target`."""
    if not shortcut:
        return z[None], None
    s, s_hat = (value.astype(jnp.float32)[None] for value in shortcut)
    return z[None] + (s - s_hat), (s, s_hat)


def _lacking(
    task: Task, z: jax.Array, shortcut: Sequence[jax.Array], output: jax.Array
) -> jax.Array:
    return lacking(goal_of(task, *_wanted(z, shortcut)), output)


@program(static_argnums=(0, 1))
def _add_joint(
    task: Task,
    stride: int,
    folded: Folded,
    joint: JointMoments | None,
    inputs: Any,
    unit: jax.Array,
    x: jax.Array,
    z: jax.Array,
    *shortcut: jax.Array,
) -> JointMoments:
    seen = _quantized(inputs, x)[0] / unit
    output = apply_folded(task.operation, folded, seen)[None]
    residual = _lacking(task, z, shortcut, output)[0]
    found = joint_moments(task.operation, stride, (seen, residual))
    return found if joint is None else jax.tree.map(jnp.add, joint, found)


@program(static_argnums=(0, 1))
def _shrunk(
    task: Task, batches: int, moments: m.Moments, joint: Any
) -> tuple[m.Moments, jax.Array]:
    """Second moments with what is added to their diagonal, and the overfit."""
    mean = jax.tree.map(lambda total: total / batches, joint)
    extra, overfit = shrinkage_of(mean, task.recipe.bias_correction)
    return moments._replace(hessian=damped(moments.hessian, extra)), overfit


@program(static_argnums=0)
def _refitted(has_free_bias: bool, folded: Folded, moments: m.Moments, state: Any) -> Folded:
    return shifted(folded, moments, m.mean_of(state), has_free_bias)


# ---- The bias, and what the search of the output's range reads


def _corrected(
    task: Task,
    x: Stored,
    others: Sequence[Stored],
    prepared: Prepared,
    rounded: Rounded | None,
) -> Corrected:
    recipe, count = task.recipe, len(x)
    layer = _start_bias(task, prepared.folded, prepared.inputs, rounded)
    if recipe.bias_correction and (prepared.inputs is not None or rounded is not None):
        sums, size = [], 0
        for number in range(count):
            values = batch_of([x, *others], number)
            sums.append(settled(_missing(task, layer, *values)))
            size += values[1].size
        layer = _shift_bias(task, size // sums[0].shape[1], layer, jnp.concatenate(sums))
    values = None
    if is_output_searched(recipe) and not task.has_output_channels:
        batches = (batch_of([x, *others], number) for number in range(count))
        found = [settled(_sample_output(task, count, layer, *values)) for values in batches]
        is_pointwise = seen_by(task, len(others) > 1).is_pointwise
        values = _joined_values(found, not task.output_objective.sees_output or is_pointwise)
    return Corrected(layer, None, values, raised_scales(layer, rounded))


@program(static_argnums=0)
def _start_bias(
    task: Task, folded: Folded, inputs: ActivationFormat | None, rounded: Rounded | None
) -> QuantizedLayer:
    return with_rounded_bias(task.operation, folded, inputs, rounded)


@program(static_argnums=0)
def _missing(
    task: Task, layer: QuantizedLayer, x: jax.Array, z: jax.Array, *shortcut: jax.Array
) -> jax.Array:
    return channel_sums(task.operation, _lacking(task, z, shortcut, _linear(task, layer, x)))


@program(static_argnums=(0, 1))
def _shift_bias(
    task: Task, positions: int, layer: QuantizedLayer, sums: jax.Array
) -> QuantizedLayer:
    missing = jnp.sum(sums, axis=0) / positions
    return with_bias(task.operation, layer, dequantized_bias(task.operation, layer) + missing)


@program(static_argnums=(0, 1))
def _sample_output(
    task: Task,
    batches: int,
    layer: QuantizedLayer,
    x: jax.Array,
    z: jax.Array,
    *shortcut: jax.Array,
) -> OutputValues:
    target, pair = _wanted(z, shortcut)
    y = _linear(task, layer, x)
    seen, added = seen_by(task, pair is not None), None if pair is None else pair[1]
    given = (task.bounds, task.movement, target, y, added, batches)
    return output_values(task.output_objective, seen, *given)


def _joined_values(found: Sequence[OutputValues], is_of_all: bool) -> OutputValues:
    """The samples of all batches; those of the first one where a whole batch is looked at."""
    extremes = _joined([each.extremes for each in found])
    used = found if is_of_all else found[:1]
    arrays = [
        None if each[0] is None else jnp.concatenate([array for array in each if array is not None])
        for each in zip(*(values[1:] for values in used), strict=True)
    ]
    return OutputValues(extremes, *arrays)
