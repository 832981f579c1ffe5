"""Clipping ranges of a layer's input and output on the calibration batches.

What the activation clips lies outside of every range of an output: under a ReLU the zero point is
the lowest code, and the ReLU is the clamp of the codes.

With granularity per_channel, channels that carry little get finer codes than those that carry much:

* outputs that nothing reads but a sum have the range of least error for every channel on its own;
* inputs x ≥ 0 are divided by t_c, √ of the scale of least error of channel c, before one range is
  searched for all; t_c is a factor of the kernel, W·x = (W·t)·(x / t), which is why the root: what
  evens out the channels of the input must not tear apart those of the kernel.

Values are stacked by batch, [batches, examples, ...].
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit.samples import InputSample, OutputSample, narrowed
from qjax.fit.sampling import sampled, sampled_channels, sampled_patches
from qjax.fit.search import Candidates, least, least_by_channel, widest
from qjax.fit.streams import map_batches
from qjax.formats.affine import QParams, with_exact_products
from qjax.formats.dynamic import EVERYTHING, ActivationFormat, Dynamic, dynamic
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import NONE, Activation, Bounds
from qjax.graph.examples import ExampleAxes
from qjax.graph.layers import Movement, Site
from qjax.graph.operation import (
    Linear,
    along_axes,
    along_channels,
    by_channel,
    scale_input_channels,
)
from qjax.objectives.base import Objective, Range
from qjax.programs import program
from qjax.recipe import LayerRecipe

NARROWEST = 1e-3  # scale of an input channel, of the widest one's


class Task(NamedTuple):
    """How to fit one layer: all that its programs depend on, and nothing else.

    Attributes:
      operation: its linear operation.
      movement: what its output goes through.
      activation: what follows its output.
      summed: what follows the sum of its output and its shortcut; None without a shortcut.
      recipe: what to do with it, its widths left out.
      candidates: of each search.
      makes_logits: whether its output is the network's, and to be taken for logits.
      examples: the axes of the examples; None if no range is that of an example.
      has_few_images: whether fits are judged on images held out, and shrunk.
    """

    operation: Linear
    movement: Movement
    activation: Activation
    summed: Activation | None
    recipe: LayerRecipe
    candidates: Candidates
    makes_logits: bool
    examples: ExampleAxes | None
    has_few_images: bool = False

    @property
    def output_objective(self) -> Objective:
        """What makes one range of the output better than another."""
        objective = self.recipe.objective
        return (self.makes_logits and objective.for_logits) or objective

    @property
    def bounds(self) -> Bounds:
        """What whatever reads the output clips it to; a sum may need all of it."""
        return self.activation.bounds if self.summed is None else EVERYTHING

    @property
    def has_output_channels(self) -> bool:
        """Whether the output has a scale per channel: nothing may read it but a sum."""
        spec = self.recipe.outputs
        is_wanted = spec is not None and spec.granularity == "per_channel"
        return is_wanted and self.summed is not None and not self.movement


def task_of(
    site: Site,
    recipe: LayerRecipe,
    candidates: Candidates,
    makes_logits: bool = False,
    examples: ExampleAxes | None = None,
    has_few_images: bool = False,
) -> Task:
    """The task of fitting a layer."""
    summed = None if site.shortcut is None else site.shortcut.activation.shown
    operation = site.layer.operation
    fields = (operation, site.movement, site.activation, summed)
    return Task(*fields, recipe.stored, candidates, makes_logits, examples, has_few_images)


def extremes_of(values: jax.Array) -> Range:
    """The least and the greatest value, float32 scalars."""
    floats = values.astype(jnp.float32)
    return floats.min(), floats.max()


# ---- Inputs


def fit_input(
    task: Task,
    limits: Any,
    x: jax.Array,
    kernel: jax.Array,
    known: QParams | None,
    divides_channels: bool,
) -> tuple[ActivationFormat | None, jax.Array | None]:
    """Chooses the range of a layer's input.

    Args:
      task: the layer.
      limits: of the input's width.
      x: its input.
      kernel: float32[groups, patch, channels].
      known: the grid of codes that the input lies on already, None if there is none.
      divides_channels: whether channels are to have scales of their own; none may be negative.

    Returns:
      Qparams, and their scale's share of the scale that the extremes need; None in float. A range
      that is found at run time is none yet.
    """
    spec = task.recipe.inputs
    if spec is None:
        return None, None
    if spec.is_dynamic:
        return dynamic(spec, limits, task.examples and task.examples.input), None
    width = jnp.ones((), jnp.float32)
    if known is not None:
        return known, width  # the values are codes of the output before: nothing is lost
    objective = task.recipe.objective
    if divides_channels:
        axes = task.operation.input_axes
        by_input = _channel_widths(task, spec, limits, axes, x)
        kernel = scale_input_channels(task.operation, kernel, by_input)
        width = along_axes(axes, by_input, x[0])
        x = x / width[None]
    patches = x if objective.loss is None else sampled_patches(task.operation, x)
    sample = InputSample(x, *extremes_of(x), patches, narrowed(kernel))
    chosen, clip = _chosen(task, limits, sample)
    return chosen.scaled(width), clip


def _chosen(task: Task, limits: Any, sample: InputSample) -> tuple[QParams, jax.Array]:
    spec = task.recipe.inputs
    assert spec is not None
    chosen = least(task.recipe.objective, sample, spec, task.candidates, limits)
    return chosen, chosen.scale / widest(sample, spec, limits).scale


@program(static_argnums=0)
def choose_input(
    task: Task, limits: Any, extremes: Range, patches: jax.Array, kernel: jax.Array
) -> tuple[QParams, jax.Array]:
    """Chooses the range of a layer's input by a sample of it.

    Args:
      task: the layer.
      limits: of the input's width.
      extremes: of the input.
      patches: a sample of its patches, float32[groups, patch, n].
      kernel: float32[groups, patch, channels].

    Returns:
      Scalar qparams, and their scale's share of the scale that the extremes need.
    """
    return _chosen(task, limits, InputSample(None, *extremes, patches, narrowed(kernel)))


def _channel_widths(
    task: Task, spec: QuantSpec, limits: Any, axes: tuple[int, ...], x: jax.Array
) -> jax.Array:
    """√ of the scale that suits each channel of an input, their geometric mean 1: float[channels].

    A channel of zeros counts as the widest.
    """
    sample, objective = sampled_channels(axes, x), task.recipe.objective
    if objective.loss is None:
        scale = sample.max(1)
    else:
        zeros = jnp.zeros_like(sample)
        static = (spec, NONE, task.candidates, limits)
        scale = least_by_channel(objective, sample, sample, zeros, *static).scale
    is_used = sample.max(1) > 0
    widest = jnp.max(jnp.where(is_used, scale, 0.0), initial=jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(is_used, jnp.maximum(scale, NARROWEST * widest), widest)
    root = jnp.sqrt(scale)
    return root / jnp.exp(jnp.mean(jnp.log(root)))


# ---- Outputs


def dynamic_output(task: Task, limits: Any) -> Dynamic:
    """The format of an output before the activation that finds its range at run time."""
    assert task.recipe.outputs is not None
    return dynamic(task.recipe.outputs, limits, task.examples and task.examples.output, task.bounds)


def dynamic_activated(task: Task, limits: Any) -> Dynamic:
    """The format of an output after the activation that finds its range at run time."""
    assert task.recipe.outputs is not None
    return dynamic(task.recipe.outputs, limits, task.examples and task.examples.activated)


class OutputValues(NamedTuple):
    """What the search of an output's range reads, clipped as its readers clip it.

    Attributes:
      extremes: the least and the greatest output.
      target: z, a sample of the outputs to be had; None if nothing is searched.
      actual: ẑ, the outputs there of the layer to be quantized.
      shortcut: s, what is added to them, None for nothing or if it is not known yet.
      stacked: all outputs, for objectives that make histograms; else None.
    """

    extremes: Range
    target: jax.Array | None
    actual: jax.Array | None
    shortcut: jax.Array | None
    stacked: jax.Array | None


def output_values(
    objective: Objective,
    activation: Activation,
    bounds: Bounds,
    movement: Movement | None,
    target: jax.Array,
    actual: jax.Array,
    shortcut: jax.Array | None,
    batches: int | None = None,
) -> OutputValues:
    """Samples outputs for the search of their range.

    Args:
      objective: what will make one range better than another.
      activation: what follows the outputs, or their sum with the shortcut.
      bounds: what their readers clip them to.
      movement: what brings them to the shape that the network returns; None for nothing.
      target: the outputs to be had, [batches, ...].
      actual: the outputs there of the layer to be quantized.
      shortcut: what is added to them, None for nothing or if it is not known yet.
      batches: how many there are in all; by default those that are given.
    """
    target, actual = (jnp.clip(values, *bounds) for values in (target, actual))
    extremes = extremes_of(actual)
    if objective.loss is None and objective.per_channel:
        return OutputValues(extremes, None, None, None, None)
    stacked = None if objective.per_channel else actual
    if objective.is_rugged:  # of all outputs, a whole example at a time
        z, z_hat = (
            values if movement is None else jax.vmap(movement)(values)
            for values in (target, actual)
        )
        z, z_hat = (values.reshape(-1, *values.shape[2:]) for values in (z, z_hat))
        return OutputValues(extremes, z, z_hat, None, stacked)
    if objective.sees_output and not activation.is_pointwise:
        # An activation of unknown form is only known at the shape of a whole batch.
        return OutputValues(extremes, target[0], actual[0], None, stacked)
    added = None if shortcut is None else sampled(shortcut, batches)
    return OutputValues(
        extremes, sampled(target, batches), sampled(actual, batches), added, stacked
    )


@program(static_argnums=(0, 1))
def values_between(
    objective: Objective, activation: Activation, floats: jax.Array, values: jax.Array
) -> OutputValues:
    """Samples values that are no layer's pre-activation output; see `output_values`."""
    return output_values(objective, activation, activation.bounds, None, floats, values, None)


@program(static_argnames=("objective", "spec", "activation", "candidates", "is_exact"))
def choose_output(
    values: OutputValues,
    limits: Any,
    *,
    objective: Objective,
    spec: QuantSpec,
    activation: Activation,
    candidates: Candidates,
    is_exact: bool = True,
) -> tuple[QParams, jax.Array]:
    """Chooses the range of an output; compiled once for all layers whose samples are alike.

    Args:
      values: samples of the output.
      limits: of its width.
      objective: what makes one range better than another.
      spec: the number format.
      activation: what follows the output, or its sum with the shortcut.
      candidates: of the search.
      is_exact: whether it may be added to something, see `with_exact_products`.

    Returns:
      Scalar qparams, and their scale's share of the scale that the extremes need.
    """
    nothing = jnp.zeros(0, jnp.float32)
    target, actual = (
        nothing if array is None else array for array in (values.target, values.actual)
    )
    stacked = actual if values.stacked is None else values.stacked
    sample = OutputSample(stacked, *values.extremes, target, actual, values.shortcut, activation)
    chosen = least(objective, sample, spec, candidates, limits)
    clip = chosen.scale / widest(sample, spec, limits).scale
    return with_exact_products(chosen) if is_exact else chosen, clip


def seen_by(task: Task, knows_shortcut: bool) -> Activation:
    """What follows a layer's output, as far as the range of the output is to see it."""
    activation = task.summed if knows_shortcut else task.activation
    assert activation is not None
    if activation.is_pointwise:
        return activation
    movement, function = task.movement, activation.function
    return activation._replace(function=_Moved(movement, function))


class _Moved(NamedTuple):
    """An activation of unknown form, of the output as the layer's operation leaves it."""

    movement: Movement
    function: Any

    def __call__(self, y: jax.Array) -> jax.Array:
        return self.function(self.movement(y))


@program(static_argnames="task")
def fit_output_channels(
    task: Task, limits: Any, target: jax.Array, actual: jax.Array, shortcut: jax.Array | None
) -> tuple[QParams, jax.Array]:
    """Chooses a range for every channel of an output that is only added to something.

    Args:
      task: the layer.
      limits: of the output's width.
      target: the outputs to be had.
      actual: the outputs there of the layer to be quantized.
      shortcut: what is added to them, None if it is not known yet.

    Returns:
      Qparams of the output's rank, and their scales' share of those that the extremes need.
    """
    spec, objective, axes = task.recipe.outputs, task.recipe.objective, task.operation.channel_axes
    assert spec is not None and task.summed is not None
    low, high = jax.vmap(partial(_channel_extremes, axes))(actual)
    covering = spec.cover(low.min(0), high.max(0), limits)
    chosen = covering
    if objective.loss is not None:
        z, z_hat = (sampled_channels(axes, values) for values in (target, actual))
        added, activation = jnp.zeros_like(z), NONE
        if shortcut is not None and objective.sees_output:
            added, activation = sampled_channels(axes, shortcut), task.summed
        static = (spec, activation, task.candidates, limits)
        chosen = least_by_channel(objective, z, z_hat, added, *static)
    scale, zero_point = (
        along_channels(task.operation, leaf, actual.ndim - 1)
        for leaf in (chosen.scale, chosen.zero_point)
    )
    shaped = QParams(scale, zero_point, chosen.qmin, chosen.qmax, chosen.dtype)
    return with_exact_products(shaped), jnp.mean(chosen.scale / covering.scale)


def _channel_extremes(axes: tuple[int, ...], values: jax.Array) -> Range:
    channels = by_channel(axes, values)
    return channels.min(1), channels.max(1)


def project_batches(format: ActivationFormat, batches: jax.Array) -> jax.Array:
    """Rounds values that are stacked by batch, each batch by itself."""
    if isinstance(format, Dynamic):
        return jax.vmap(format.project)(batches)
    if not format.scale.ndim:
        return format.project(batches)
    scale, zero_point = format.scale[None], format.zero_point[None]
    return dataclasses.replace(format, scale=scale, zero_point=zero_point).project(batches)


def activated(activation: Activation, movement: Movement, y: jax.Array) -> jax.Array:
    """Outputs after their activation, [batches, ...]."""
    if activation.is_pointwise:
        return activation.function(y)
    return map_batches(lambda batch: activation.function(movement(batch)), y)
