"""Clipping ranges of a layer's input and output on the calibration batches.

With granularity per_channel, channels that carry little get finer codes than those that carry much:

* outputs that nothing reads but a sum have the range of least error for every channel on its own;
* inputs x ≥ 0 are divided by t_c, √ of the scale of least error of channel c, before one range is
  searched for all; t_c is a factor of the kernel, W·x = (W·t)·(x / t), which is why the root: what
  evens out the channels of the input must not tear apart those of the kernel.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.fit import observers, search
from qjax.formats.affine import QParams, affine_qparams
from qjax.formats.spec import LayerRecipe, QuantSpec
from qjax.graph import jaxpr
from qjax.graph.fold import Folded
from qjax.graph.layers import Site
from qjax.graph.operation import (
    Linear,
    along_axes,
    along_channels,
    by_channel,
    input_axes,
    scale_input_channels,
)
from qjax.run.function import moved

# Samples per layer, spread evenly over all calibration images and positions.
MOMENT_PATCHES = 2**16  # for the second moments of its input
SAMPLED_PATCHES = 2**12  # for the search of its input range
SAMPLED_VALUES = 2**18  # for the search of its output range, or of ranges per channel
PERCENT = 99.9  # of the values, that the `percentile` range keeps
NARROWEST = 1e-3  # scale of an input channel, of the widest one's

Arrays = list[jax.Array]  # one per calibration batch
Activation = Callable[[jax.Array], jax.Array]


class Task(NamedTuple):
    """One layer to fit.

    Attributes:
      site: where it stands.
      recipe: what to do with it.
      grid: the candidates of each search.
      makes_logits: whether its output is the network's, and to be taken for logits.
    """

    site: Site
    recipe: LayerRecipe
    grid: search.Grid
    makes_logits: bool

    @property
    def is_judged_by_softmax(self) -> bool:
        """Whether the range of the output is the one that keeps the probabilities of classes."""
        return self.makes_logits and self.recipe.range_method == "output_mse"

    @property
    def operation(self) -> Linear:
        """The layer's linear operation."""
        return self.site.layer.operation


def fit_input(
    task: Task, x: Arrays, folded: Folded, grid: QParams | None
) -> tuple[QParams | None, float | None]:
    """Chooses the range of a layer's input.

    Args:
      task: the layer.
      x: its input on every batch.
      folded: its kernel and bias.
      grid: the grid of codes that the input lies on already, None if there is none.

    Returns:
      Qparams, and their scale's share of the scale that the extremes need; None in float.
    """
    spec, method = task.recipe.inputs, task.recipe.range_method
    if spec is None:
        return None, None
    if grid is not None and (grid.qmin, grid.qmax) == (spec.qmin, spec.qmax):
        return grid, 1.0  # the values are codes of the output before: nothing is lost
    low, high = observers.observe(observers.min_max(), x)
    axes = input_axes(task.operation)
    width, kernel = jnp.ones(()), folded.kernel
    if spec.granularity == "per_channel" and axes and float(low) >= 0:
        by_input = _channel_widths(task, spec, axes, x)
        kernel = scale_input_channels(task.operation, kernel, by_input)
        width = along_axes(axes, by_input, x[0])
        x = [batch / width for batch in x]
        low, high = observers.observe(observers.min_max(), x)

    def searched(extremes: search.Range) -> QParams:
        patches = _sampled_patches(task.operation, x)
        return search.search_input(patches, kernel, extremes, spec, method, task.grid)

    inputs, clip = fit_range(method, spec, x, (low, high), searched, task.grid)
    return QParams(width * inputs.scale, inputs.zero_point, inputs.qmin, inputs.qmax), clip


def _channel_widths(task: Task, spec: QuantSpec, axes: tuple[int, ...], x: Arrays) -> jax.Array:
    """√ of the scale that suits each channel of an input, their geometric mean 1: float[channels].

    A channel of zeros counts as the widest.
    """
    sample = _sampled_channels(axes, x)
    if task.recipe.range_method == "absmax":
        scale = sample.max(1)
    else:
        zeros = jnp.zeros_like(sample)
        scale = search.search_channels(sample, sample, zeros, spec, identity, task.grid).scale
    is_used = sample.max(1) > 0
    widest = jnp.max(jnp.where(is_used, scale, 0.0), initial=jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(is_used, jnp.maximum(scale, NARROWEST * widest), widest)
    root = jnp.sqrt(scale)
    return root / jnp.exp(jnp.mean(jnp.log(root)))


def fit_output(
    task: Task, target: Arrays, actual: Arrays, shortcut: Arrays | None
) -> tuple[QParams | None, float | None]:
    """Chooses the range of a layer's output before the activation.

    Args:
      task: the layer.
      target: the outputs to be had, on every batch.
      actual: the outputs there of the layer to be quantized.
      shortcut: what is added to them, None for nothing or if it is not known yet.

    Returns:
      Qparams, and their scale's share of the scale that the extremes need; None in float.
    """
    spec, method, site = task.recipe.outputs, task.recipe.range_method, task.site
    if spec is None or task.recipe.output_position == "post_activation":
        return None, None
    activation = identity
    if method == "output_mse":
        activation = activation_of(site) if shortcut is None else summed_activation(site)
    if spec.granularity == "per_channel" and site.shortcut is not None and not site.movement:
        return _fit_output_channels(task, spec, target, actual, shortcut)
    low, high = observers.observe(observers.min_max(), actual)
    if shortcut is None and activation in (jax.nn.relu, jax.nn.relu6):
        low = jnp.zeros_like(low)
    if shortcut is None and activation is jax.nn.relu6:
        high = jnp.minimum(high, 6)

    def searched(extremes: search.Range) -> QParams:
        if task.is_judged_by_softmax:
            z, z_hat = (
                jnp.concatenate([moved(site, batch) for batch in values])
                for values in (target, actual)
            )
            return search.search_logits(z, z_hat, extremes, spec, task.grid)
        # An activation of unknown form is only known at the shape of a whole batch.
        is_pointwise = activation in (identity, jax.nn.relu, jax.nn.relu6)
        z, z_hat = (_sampled(v) if is_pointwise else v[0] for v in (target, actual))
        added = None if shortcut is None else _sampled(shortcut)
        return search.search_output(z, z_hat, extremes, spec, activation, task.grid, added)

    outputs, clip = fit_range(method, spec, actual, (low, high), searched, task.grid)
    return with_exact_products(outputs), clip


def _fit_output_channels(
    task: Task, spec: QuantSpec, target: Arrays, actual: Arrays, shortcut: Arrays | None
) -> tuple[QParams, float]:
    """A range for every channel of an output that is only added to something."""
    axes = task.operation.channel_axes
    observed = [_channel_extremes(axes, batch) for batch in actual]
    low, high = (jnp.stack(ends) for ends in zip(*observed, strict=True))
    widest = affine_qparams(low.min(0), high.max(0), spec)
    chosen = widest
    if task.recipe.range_method != "absmax":
        z, z_hat = (_sampled_channels(axes, values) for values in (target, actual))
        added, activation = jnp.zeros_like(z), identity
        if shortcut is not None and task.recipe.range_method == "output_mse":
            added, activation = _sampled_channels(axes, shortcut), summed_activation(task.site)
        chosen = search.search_channels(z, z_hat, added, spec, activation, task.grid)
    shaped = jax.tree.map(lambda q: along_channels(task.operation, q, actual[0].ndim), chosen)
    return with_exact_products(shaped), float(jnp.mean(chosen.scale / widest.scale))


def fit_activated(task: Task, target: Arrays, actual: Arrays) -> tuple[QParams, float]:
    """Chooses the range of a layer's output after its activation.

    Args:
      task: the layer, its outputs not in float.
      target: the values to be had, on every batch.
      actual: the values there to be quantized.

    Returns:
      Qparams, and their scale's share of the scale that the extremes need.
    """
    spec = task.recipe.outputs
    assert spec is not None

    def searched(extremes: search.Range) -> QParams:
        if task.is_judged_by_softmax:
            z, z_hat = jnp.concatenate(target), jnp.concatenate(actual)
            return search.search_logits(z, z_hat, extremes, spec, task.grid)
        samples = _sampled(target), _sampled(actual)
        return search.search_output(*samples, extremes, spec, identity, task.grid)

    extremes = observers.observe(observers.min_max(), actual)
    method = task.recipe.range_method
    activated, clip = fit_range(method, spec, actual, extremes, searched, task.grid)
    return with_exact_products(activated), clip


def with_exact_products(qparams: QParams) -> QParams:
    """Rounds scales to 16 significant bits: times a code of 8 bits they are exact in float32.

    The sum of two such values is rounded once, in whatever way a compiler fuses it, so that every
    evaluation of a residual sum is the same.
    """
    scale = lax.reduce_precision(qparams.scale, 8, 15)
    return QParams(scale, qparams.zero_point, qparams.qmin, qparams.qmax)


def activation_of(site: Site) -> Activation:
    """What follows a layer's output."""
    return KNOWN.get(site.layer.activation) or partial(_activate, site)


def summed_activation(site: Site) -> Activation:
    """What follows the sum of a layer's output and its shortcut; the identity if unknown."""
    assert site.shortcut is not None
    return KNOWN.get(site.shortcut.activation, identity)


def identity(x: jax.Array) -> jax.Array:
    """No activation."""
    return x


KNOWN = {"none": identity, "relu": jax.nn.relu, "relu6": jax.nn.relu6}


def _activate(site: Site, z: jax.Array) -> jax.Array:
    env = {site.output: moved(site, z)}
    for equation in site.activation:
        jaxpr.evaluate_equation(equation, env)
    return env[site.activated]


def fit_range(
    method: str,
    spec: QuantSpec,
    values: Arrays,
    extremes: search.Range,
    searched: Callable[[search.Range], QParams],
    grid: search.Grid = search.GRID,
) -> tuple[QParams, float]:
    """Chooses a clipping range of activations.

    Args:
      method: `absmax`, `percentile`, `kl`, or one that `searched` knows.
      spec: the number format.
      values: the values on every calibration batch.
      extremes: the least and the greatest value to represent.
      searched: finds the range with the least squared error inside the extremes.
      grid: the candidates for each end of the range.

    Returns:
      Scalar qparams, and their scale's share of the scale that the extremes need.
    """
    widest = affine_qparams(*extremes, spec)
    match method:
        case "absmax":
            chosen = widest
        case "percentile":
            low, high = observers.observe(observers.percentile(PERCENT, *extremes), values)
            chosen = affine_qparams(low, high, spec)
        case "kl":
            counter = observers.histogram(*extremes, bins=search.HISTOGRAM_BINS)
            chosen = search.search_entropy(observers.observe(counter, values), extremes, spec, grid)
        case _:
            chosen = searched(extremes)
    return chosen, float(chosen.scale / widest.scale)


def coprime_stride(size: int, limit: int) -> int:
    """The least stride that leaves at most `limit` of `size` elements and meets every channel."""
    stride = max(1, math.ceil(size / limit))
    while math.gcd(stride, size) != 1:
        stride += 1
    return stride


def _sampled(values: Arrays) -> jax.Array:
    """Elements at pseudo-random places, the same for all arrays of one size; all, if there are few.

    Their number, and with it what has to be compiled, does not depend on the size of the arrays.
    """
    size, limit = values[0].size, SAMPLED_VALUES // len(values)
    if size <= limit:
        return jnp.concatenate([batch.reshape(-1) for batch in values])
    places = np.random.default_rng(size).integers(size, size=limit)
    return jnp.concatenate([batch.reshape(-1)[places] for batch in values])


@partial(jax.jit, static_argnums=0)
def _channel_extremes(axes: tuple[int, ...], values: jax.Array) -> search.Range:
    channels = by_channel(axes, values)
    return channels.min(1), channels.max(1)


def _sampled_channels(axes: tuple[int, ...], values: Arrays) -> jax.Array:
    """Values at pseudo-random positions, the same for all arrays of one size: [channels, n]."""
    channels = math.prod(values[0].shape[axis] for axis in axes)
    size = values[0].size // channels
    limit = max(1, SAMPLED_VALUES // channels // len(values))
    places = np.arange(size)
    if size > limit:
        places = np.random.default_rng(size).integers(size, size=limit)
    return jnp.concatenate([_at_positions(axes, batch, places) for batch in values], axis=1)


@partial(jax.jit, static_argnums=0)
def _at_positions(axes: tuple[int, ...], values: jax.Array, places: jax.Array) -> jax.Array:
    return by_channel(axes, values)[:, places]


def patch_stride(operation: Linear, x: Arrays, limit: int) -> int:
    """The stride between positions that leaves about `limit` patches of all the batches `x`."""
    positions = jax.eval_shape(operation.patches, x[0]).shape[0]
    return coprime_stride(positions, max(1, limit // len(x)))


def _sampled_patches(operation: Linear, x: Arrays) -> jax.Array:
    stride = patch_stride(operation, x, SAMPLED_PATCHES)
    return jnp.concatenate([_strided_patches(operation, stride, batch) for batch in x])


@partial(jax.jit, static_argnums=(0, 1))
def _strided_patches(operation: Linear, stride: int, x: jax.Array) -> jax.Array:
    return operation.patches(x.astype(jnp.float32), stride)
