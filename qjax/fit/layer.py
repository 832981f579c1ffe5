"""Fitting one layer: the range of its input, its kernel, its bias, the range of its output.

A layer takes four programs: `prepare` (its input), `round_kernel`, `correct` (its bias) and
`finish` (its output). They depend on shapes and methods, not on names, widths or networks, so that
layers of equal shape share them; where nothing is searched, all four are one.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qjax.fit import moments as m
from qjax.fit.held_out import choose_shrinkage
from qjax.fit.observers import observe_stacked
from qjax.fit.ranges import (
    OutputValues,
    Task,
    activated,
    choose_output,
    dynamic_output,
    fit_input,
    fit_output_channels,
    output_values,
    project_batches,
    seen_by,
)
from qjax.fit.refit import Goal, lacking, refit, residuals
from qjax.fit.samples import KernelSample
from qjax.fit.sampling import MOMENT_PATCHES, patch_stride
from qjax.fit.search import Candidates, least, widest
from qjax.fit.streams import map_batches
from qjax.formats.affine import QParams, magnitude, sqnr_db
from qjax.formats.base import elementwise
from qjax.formats.dynamic import ActivationFormat
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import NONE, Activation
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.layers import Movement
from qjax.graph.operation import Linear, along_channels
from qjax.objectives.base import Objective
from qjax.programs import program
from qjax.recipe import LayerRecipe
from qjax.rounding.base import Problem, Rounding
from qjax.rounding.metric import damped
from qjax.rounding.sweeps import coordinate_sweeps
from qjax.run.layer import (
    QuantizedLayer,
    apply_linear,
    dequantized_bias,
    fold_input_scales,
    with_bias,
)
from qjax.sharing import shared

_LEAST_WEIGHT = 1e-30  # the greatest one of a channel that is not taken for zeros


class Fit(NamedTuple):
    """A fitted layer and how well it does; numbers may still be on their way from the device.

    Attributes:
      layer: its quantized parameters.
      weight_sqnr_db: of its kernel, against the one that was rounded; infinite in float.
      energies: of its output after the activation in the float network, and of the difference from
        it: sums by batch; None without images.
      weight_clip: the clipping range's share of the range of the weights, mean over scales; None
        in float.
      input_clip: of its input; None in float.
      output_clip: of its output; None in float.
      raised: how many scales of its kernel are greater than its weights need, to leave room for
        biases.
      overfit: how its least-squares fit did on images held out, see `Shrinkage`; None where that
        was not asked for.
      output_moments: mean and deviation of each channel of its output in the float network,
        float32[2, channels]; None without images.
    """

    layer: QuantizedLayer
    weight_sqnr_db: Any
    energies: tuple[jax.Array, jax.Array] | None
    weight_clip: Any
    input_clip: Any
    output_clip: Any
    raised: Any = 0
    overfit: Any = None
    output_moments: Any = None

    @property
    def output_sqnr_db(self) -> float | None:
        """SQNR of its output after the activation, against the float network's; None if unknown."""
        return None if self.energies is None else decibels(self.energies)


def decibels(energies: tuple[Any, Any]) -> float:
    """The ratio of two energies, each a sum by batch; infinite where one is 0, NaN if one is."""
    signal, noise = (math.fsum(np.asarray(by_batch).tolist()) for by_batch in energies)
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


class Values(NamedTuple):
    """What a layer is fitted on, stacked by batch.

    Attributes:
      x_float: its input in the float network.
      x: the input that its quantized predecessors produce.
      shortcut: what its output is added to in (the float, the quantized) network; None for nothing
        or if it is not known yet.
    """

    x_float: jax.Array
    x: jax.Array
    shortcut: tuple[jax.Array, jax.Array] | None


class Fitted(NamedTuple):
    """What fitting a layer gives: its `Fit`, and its output in the float and the quantized network.

    The outputs are those that other steps read, [batches, ...].
    """

    fit: Fit
    float_output: jax.Array
    output: jax.Array


def fit_layer(
    task: Task,
    divides_channels: bool,
    limits: Any,
    values: Values,
    folded: Folded,
    known: QParams | None,
) -> Fitted:
    """Fits a layer.

    Args:
      task: what to do.
      divides_channels: whether the channels of its input get scales of their own.
      limits: of the widths, see `LayerRecipe.limits`.
      values: what it is fitted on.
      folded: its kernel and bias in float.
      known: the grid of codes that its input lies on already, None if there is none.

    Returns:
      A `Fitted`.
    """
    fit = _fit_at_once if task.recipe.is_closed_form else _fit_in_steps
    return fit(task, divides_channels, limits, values, folded, known)


def _fit_in_steps(
    task: Task,
    divides_channels: bool,
    limits: Any,
    values: Values,
    folded: Folded,
    known: QParams | None,
) -> Fitted:
    """Fits input, kernel and output of a layer, one after the other."""
    prepared = prepare(task, divides_channels, limits["inputs"], values, folded, known)
    rounded = None
    if task.recipe.weights is not None:
        rounded = round_kernel(
            prepared.folded.kernel,
            prepared.hessian,
            limits["weights"],
            spec=task.recipe.weights,
            objective=task.recipe.objective,
            rounding=task.recipe.round_with,
            sweeps=task.recipe.sweeps,
            candidates=task.candidates,
        )
    target = prepared.float_output if prepared.target is None else prepared.target
    corrected = correct(task, values.x, values.shortcut, target, prepared, rounded)
    added = None if values.shortcut is None else values.shortcut[1]
    outputs, output_clip = fit_output(task, limits["outputs"], target, corrected, added)
    floats, output, energies = finish(
        task.movement, task.activation, prepared.float_output, corrected.output, outputs
    )
    layer = dataclasses.replace(corrected.layer, inputs=prepared.inputs, outputs=outputs)
    weight_sqnr_db, weight_clip = (
        (math.inf, None) if rounded is None else (rounded.sqnr_db, rounded.clip)
    )
    clips = (weight_clip, prepared.input_clip, output_clip)
    fit = Fit(
        layer,
        weight_sqnr_db,
        energies,
        *clips,
        corrected.raised,
        prepared.overfit,
        prepared.output_moments,
    )
    return Fitted(fit, floats, output)


_fit_at_once = program(static_argnums=(0, 1))(_fit_in_steps)


# ---- The input, and the kernel that suits it


class Prepared(NamedTuple):
    """A layer before its kernel is rounded.

    Attributes:
      float_output: z, its output in the float network, as its operation leaves it; None where its
        input is unknown.
      target: the output to be had, the layer's share of the float sum z + s where the other one is
        ŝ; None where it is z.
      inputs: qparams of its input; None in float.
      input_clip: their share of the extremes; None in float or if they are found at run time.
      folded: kernel and bias, refitted, in units of the input's scales if it has several.
      hessian: the second moments of the quantized input's patches, None if nothing reads them.
      overfit: as in `Fit`.
      output_moments: as in `Fit`.
    """

    float_output: Any
    target: jax.Array | None
    inputs: ActivationFormat | None
    input_clip: jax.Array | None
    folded: Folded
    hessian: jax.Array | None
    overfit: jax.Array | None = None
    output_moments: jax.Array | None = None


@program(static_argnums=(0, 1))
def prepare(
    task: Task,
    divides_channels: bool,
    limits: Any,
    values: Values,
    folded: Folded,
    known: QParams | None,
) -> Prepared:
    """Chooses the range of a layer's input and refits its kernel to that."""
    operation, recipe = task.operation, task.recipe
    z = map_batches(partial(apply_folded, operation, folded), values.x_float)
    output_moments = channel_moments(operation, z)
    target = None
    if values.shortcut is not None:
        s, s_hat = values.shortcut
        target = z + (s - s_hat)
    inputs, clip = fit_input(task, limits, values.x, folded.kernel, known, divides_channels)
    if isinstance(inputs, QParams) and inputs.scale.ndim:  # fitted in units of the codes
        folded = folded._replace(kernel=fold_input_scales(operation, inputs, folded.kernel))
    x, unscaled = in_units_of_codes(values.x, inputs)
    if not recipe.needs_moments:
        return Prepared(z, target, inputs, clip, folded, None, None, output_moments)
    seen = x if unscaled is None else project_batches(unscaled, x)
    unit = magnitude(jnp.max(jnp.abs(seen)))  # what is squared does not leave float32
    seen = seen / unit
    stride = patch_stride(operation, seen, MOMENT_PATCHES)
    moments = observe_stacked(m.moments(operation, stride), seen)
    if recipe.bias_correction:  # the bias takes up the means, the kernel answers for the rest
        moments = m.centered(moments)
    goal = goal_of(task, z if target is None else target, values.shortcut)
    overfit = None
    times = min(recipe.reconstructions, 1) if goal.activation == NONE else recipe.reconstructions
    if times:
        correction = recipe.bias_correction
        folded = folded._replace(kernel=folded.kernel * unit)
        shrunk = moments
        if task.has_few_images:
            missing = residuals(operation, folded, seen, goal)
            extra, overfit = choose_shrinkage(operation, seen, missing, correction)
            shrunk = moments._replace(hessian=damped(moments.hessian, extra))
        folded = refit(operation, folded, shrunk, seen, goal, stride, correction, times)
        folded = folded._replace(kernel=folded.kernel / unit)
    fitted = (inputs, clip, folded, moments.hessian)
    return Prepared(z, target, *fitted, overfit, output_moments)


def in_units_of_codes(
    x: jax.Array, inputs: ActivationFormat | None
) -> tuple[jax.Array, ActivationFormat | None]:
    """An input divided by its scales per channel, and the qparams that are left to apply.

    Args:
      x: float[batches, ...].
      inputs: qparams of a batch: scalars, or per channel; None in float.
    """
    if not isinstance(inputs, QParams) or not inputs.scale.ndim:
        return x, inputs
    return x * inputs.inverse_scale[None], dataclasses.replace(
        inputs, scale=jnp.ones((), jnp.float32)
    )


def goal_of(task: Task, target: jax.Array, shortcut: tuple[jax.Array, jax.Array] | None) -> Goal:
    """What a layer's output is for.

    Args:
      task: the layer.
      target: the output to be had.
      shortcut: what it is added to in (the float, the quantized) network; None for nothing.
    """
    if shortcut is None:
        return Goal(target, None, task.activation.clip)
    assert task.summed is not None
    return Goal(target, shortcut[1], task.summed.clip)


# ---- The kernel


class Rounded(NamedTuple):
    """A rounded kernel.

    Attributes:
      codes: [groups, patch, channels].
      format: what they stand for.
      sqnr_db: against the kernel that was rounded.
      clip: the scales' share of those that the extremes need, their mean.
    """

    codes: jax.Array
    format: Any
    sqnr_db: jax.Array
    clip: jax.Array


@program(static_argnames=("spec", "objective", "rounding", "sweeps", "candidates"))
def round_kernel(
    kernel: jax.Array,
    hessian: jax.Array | None,
    limits: Any,
    *,
    spec: QuantSpec,
    objective: Objective,
    rounding: Rounding,
    sweeps: int,
    candidates: Candidates,
) -> Rounded:
    """Chooses the range of a kernel and rounds it.

    Compiled once per shape and format of kernels, whatever else differs between layers.
    """
    chex.assert_rank(kernel, 3)
    if hessian is not None:
        groups, patch, _ = kernel.shape
        chex.assert_shape(hessian, (groups, patch, patch))
    kernel = shared(kernel, 2, is_returned=True)
    given, (kernel, unit) = kernel, _in_units(kernel, spec)
    sample = KernelSample(kernel, spec, hessian)
    format = least(objective, sample, spec, candidates, limits)
    if spec.family.fit is not None:
        format = spec.family.fit(sample.values, sample.importance, format)
    covering = widest(sample, spec, limits)
    codes, format = rounding.round(Problem(kernel, format, hessian))
    chex.assert_equal_shape([codes, kernel])
    if sweeps:
        assert hessian is not None
        ratio, refit = spec.scales.nearest_ratio, spec.family.refit
        codes, format = coordinate_sweeps(codes, kernel, hessian, format, sweeps, ratio, refit)
    clip = jnp.mean(format.step / covering.step)
    format = format.scaled(unit)
    values = elementwise(format, kernel.shape[1]).decode(codes)
    return Rounded(codes, format, sqnr_db(given, values), clip)


def _in_units(kernel: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """A kernel divided by powers of two, one for each of its scales, and these.

    Nothing is rounded, but what is squared does not leave float32. Channels whose greatest weight
    is below 10^-30 become zeros.
    """
    axes = None if spec.granularity == "per_tensor" else 1
    peak = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True)
    unit = jnp.where(peak < _LEAST_WEIGHT, 1.0, magnitude(peak))
    return jnp.where(peak < _LEAST_WEIGHT, 0.0, kernel / unit), unit


# ---- The bias


class Corrected(NamedTuple):
    """A layer but for the range of its output.

    Attributes:
      layer: its parameters, in units of the input's codes.
      output: what it computes, [batches, ...]; None if it is unknown.
      values: what the search of the output's range reads; None if there is none.
      raised: as in `Fit`.
    """

    layer: QuantizedLayer
    output: Any
    values: OutputValues | None
    raised: Any


@program(static_argnums=0)
def correct(
    task: Task,
    x: jax.Array,
    shortcut: tuple[jax.Array, jax.Array] | None,
    target: jax.Array,
    prepared: Prepared,
    rounded: Rounded | None,
) -> Corrected:
    """Rounds a layer's bias and shifts it by the mean of what the output lacks."""
    operation, recipe = task.operation, task.recipe
    x, unscaled = in_units_of_codes(x, prepared.inputs)
    layer = with_rounded_bias(operation, prepared.folded, unscaled, rounded)
    y = map_batches(partial(apply_linear, operation, layer), x)
    if recipe.bias_correction and (unscaled is not None or rounded is not None):
        missing = _channel_means(operation, lacking(goal_of(task, target, shortcut), y))
        bias = dequantized_bias(operation, layer) + missing
        layer = with_bias(operation, layer, bias)
        y = map_batches(partial(apply_linear, operation, layer), x)
    values = None
    if is_output_searched(recipe) and not task.has_output_channels:
        objective = task.output_objective
        seen = seen_by(task, shortcut is not None)
        added = None if shortcut is None else shortcut[1]
        values = output_values(objective, seen, task.bounds, task.movement, target, y, added)
    return Corrected(layer, y, values, raised_scales(layer, rounded))


def with_rounded_bias(
    operation: Linear, folded: Folded, inputs: ActivationFormat | None, rounded: Rounded | None
) -> QuantizedLayer:
    """A layer whose output is in float.

    Args:
      operation: the linear operation.
      folded: its kernel and bias in float.
      inputs: of its input, see `in_units_of_codes`.
      rounded: its kernel; None in float.
    """
    codes, format = (folded.kernel, None) if rounded is None else (rounded.codes, rounded.format)
    layer = QuantizedLayer(codes, folded.bias, format, inputs, None, None)
    return with_bias(operation, layer, folded.bias)


def raised_scales(layer: QuantizedLayer, rounded: Rounded | None) -> Any:
    """How many scales of a kernel are greater than where it was rounded."""
    return 0 if rounded is None else jnp.sum(layer.weights.step > rounded.format.step)


def _has_output_range(recipe: LayerRecipe) -> bool:
    return recipe.outputs is not None and recipe.output_position != "post_activation"


def is_output_searched(recipe: LayerRecipe) -> bool:
    """Whether the range of an output before the activation is chosen beforehand."""
    is_static = recipe.outputs is not None and not recipe.outputs.is_dynamic
    return is_static and _has_output_range(recipe)


def _channel_means(operation: Linear, values: jax.Array) -> jax.Array:
    """The mean of each output channel, float32[groups * channels]."""
    sums = jnp.sum(channel_sums(operation, values), axis=0)
    return sums / (values.size // len(sums))


def channel_sums(operation: Linear, values: jax.Array) -> jax.Array:
    """The sum of each output channel of every batch, float32[batches, groups * channels]."""
    kept = {1 + axis % (values.ndim - 1) for axis in operation.channel_axes}
    by_batch = values.sum([axis for axis in range(1, values.ndim) if axis not in kept])
    return by_batch.reshape(len(values), -1)


def channel_moments(operation: Linear, values: jax.Array) -> jax.Array:
    """The mean and the deviation of each output channel, float32[2, groups * channels]."""
    values = values.astype(jnp.float32)
    mean = _channel_means(operation, values)
    centered = values - along_channels(operation, mean, values.ndim - 1)[None]
    return jnp.stack([mean, jnp.sqrt(_channel_means(operation, jnp.square(centered)))])


# ---- The output


def fit_output(
    task: Task, limits: Any, target: Any, corrected: Corrected, added: jax.Array | None
) -> tuple[ActivationFormat | None, Any]:
    """Chooses the range of a layer's output before the activation; None in float.

    Args:
      task: the layer.
      limits: of the output's width.
      target: the outputs to be had; None if they are unknown, and their range is not static.
      corrected: the layer but for that range.
      added: what the output is added to, None for nothing or if it is not known yet.

    Returns:
      The format, and its scale's share of the scale that the extremes need.
    """
    spec = task.recipe.outputs
    if spec is None or not _has_output_range(task.recipe):
        return None, None
    if spec.is_dynamic:
        return dynamic_output(task, limits), None
    if task.has_output_channels:
        return fit_output_channels(task, limits, target, corrected.output, added)
    assert corrected.values is not None
    return choose_output(
        corrected.values,
        limits,
        objective=task.output_objective,
        spec=spec,
        activation=seen_by(task, added is not None),
        candidates=task.candidates,
    )


@program(static_argnums=(0, 1))
def finish(
    movement: Movement,
    activation: Activation,
    float_output: jax.Array,
    output: jax.Array,
    outputs: ActivationFormat | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Rounds outputs: (float outputs, quantized outputs, energies); see `Fitted` and `Fit`."""
    if outputs is not None:
        output = project_batches(outputs, output)
    moved = [jax.vmap(movement)(values) for values in (float_output, output)]
    shown, shown_hat = (activated(activation, movement, y) for y in (float_output, output))
    return moved[0], moved[1], energies(shown, shown_hat)


def energies(
    values: jax.Array, values_hat: jax.Array, unit: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Those of values and of what others lack of them, sums by batch in a unit of their own."""
    values, values_hat = values.astype(jnp.float32), values_hat.astype(jnp.float32)
    unit = unit_of(values) if unit is None else unit
    axes = tuple(range(1, values.ndim))
    signal = jnp.sum(jnp.square(values / unit), axes)
    return signal, jnp.sum(jnp.square((values - values_hat) / unit), axes)


def unit_of(values: jax.Array) -> jax.Array:
    """The unit that values are divided by before they are squared."""
    return magnitude(jnp.max(jnp.abs(values.astype(jnp.float32)), initial=0))
