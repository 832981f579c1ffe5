"""Fitting the layers of a network one after the other, in dataflow order.

Each layer is fitted on the input that its already quantized predecessors produce (the float input,
unless `Recipe.sequential`) toward the output that the float network has there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit import observers, ranges, search
from qjax.fit.ranges import MOMENT_PATCHES, Arrays, Task, patch_stride
from qjax.fit.refit import Goal, lacking, refit
from qjax.fit.rounding import coordinate_sweeps, elementwise, round_gptq, round_nearest
from qjax.fit.streams import Streams, cut
from qjax.formats.affine import QParams, dequantize, fake_quant, sqnr_db
from qjax.formats.spec import QuantSpec, RangeMethod, Recipe, Rounding
from qjax.graph import jaxpr
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.layers import Network, Site, keeps_codes
from qjax.graph.operation import Linear
from qjax.progress import Progress
from qjax.run.function import Activated, moved
from qjax.run.layer import (
    QuantizedLayer,
    apply_linear,
    dequantized_bias,
    fold_input_scales,
    quantize_bias,
)


class Fit(NamedTuple):
    """A fitted layer and how well it does.

    Attributes:
      layer: its quantized parameters.
      weight_sqnr_db: of its kernel, against the one that was rounded.
      output_sqnr_db: of its output after the activation, against the float network's.
      weight_clip: the clipping range's share of the range of the weights, mean over scales; None
        in float.
      input_clip: likewise of its input.
      output_clip: likewise of its output.
    """

    layer: QuantizedLayer
    weight_sqnr_db: float
    output_sqnr_db: float
    weight_clip: float | None
    input_clip: float | None
    output_clip: float | None


def calibrate(
    network: Network,
    leaves: Sequence[jax.Array],
    folded: Sequence[Folded],
    batches: Iterable[Sequence[jax.Array]],
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Fit]:
    """Quantizes every layer of a network.

    Args:
      network: the network, traced at the size of the batches.
      leaves: the leaves of its params.
      folded: kernel and bias of each layer.
      batches: for each batch, the leaves of an input.
      recipe: what to do.
      progress: called with (layer name, layers done, layers).

    Returns:
      A `Fit` per layer, by name, in dataflow order.
    """
    names = [site.layer.name for site in network.sites]
    recipes = recipe.by_layer(names)
    by_name = dict(zip(names, folded, strict=True))
    streams = Streams(network, leaves, batches, recipe.sequential)
    grid = search.Grid(recipe.grid_size, recipe.refinements)
    logits = _logits(network) if recipe.logits else None
    grids: dict[core.Var, QParams] = {}
    fits: dict[str, Fit] = {}
    for segment in cut(network):
        streams.advance(segment)
        for equation in segment.equations:
            _follow_grid(equation, grids)
        match segment.step:
            case Site(layer=layer) as site:
                progress(layer.name, len(fits), len(names))
                task = Task(site, recipes[layer.name], grid, site is logits)
                fits[layer.name] = _fit_layer(task, by_name[layer.name], streams, grids)
            case Activated(site=site):
                name = site.layer.name
                task = Task(site, recipes[name], grid, site is logits)
                fits[name] = _fit_activated(task, fits[name], streams, grids)
            case None:
                progress("", len(names), len(names))
    return fits


def _logits(network: Network) -> Site:
    """The layer whose output is the output of the network."""
    for site in network.sites:
        if site.output in network.flat.outputs:
            return site
    raise ValueError(
        "`logits` needs a layer whose pre-activation output the network returns; it returns "
        "something else. Quantize with logits=False."
    )


def _follow_grid(equation: core.JaxprEqn, grids: dict[core.Var, QParams]) -> None:
    """Records that an equation's result lies on the same grid of codes as its operand."""
    for var in jaxpr.variables(equation.invars):
        if var in grids and keeps_codes(equation, var, float(grids[var].range[1])):
            grids[equation.outvars[0]] = grids[var]


def _fit_layer(task: Task, folded: Folded, streams: Streams, grids: dict[core.Var, QParams]) -> Fit:
    """Fits a layer up to its pre-activation output and writes that to the streams."""
    site, operation = task.site, task.site.layer.operation
    x_float, x = streams.read(site.input)
    float_output = [apply_folded(operation, folded, batch) for batch in x_float]
    shortcut = _read_shortcut(site, streams)
    added, activation = [None] * len(x), ranges.KNOWN.get(site.layer.activation, ranges.identity)
    target = float_output
    if shortcut is not None:  # the layer's share of the float sum z + s, where the other one is ŝ
        added, activation = shortcut[1], ranges.summed_activation(site)
        target = [z + (s - s_hat) for z, s, s_hat in zip(target, *shortcut, strict=True)]
    goal = Goal(target, added, activation)
    inputs, input_clip = ranges.fit_input(task, x, folded, grids.get(site.input))
    unscaled = inputs
    if inputs is not None and inputs.scale.ndim:  # fitted in units of the codes
        x = [batch * inputs.inverse_scale for batch in x]
        folded = folded._replace(kernel=fold_input_scales(operation, inputs, folded.kernel))
        unscaled = dataclasses.replace(inputs, scale=jnp.ones(()))
    layer, weight_sqnr_db, weight_clip = _fit_kernel(task, x, goal, folded, unscaled)
    actual = [_apply_linear(operation, layer, batch) for batch in x]
    if task.recipe.bias_correction and (inputs is not None or layer.weights is not None):
        layer = _shift_bias(operation, layer, _channel_means(operation, lacking(goal, actual)))
        actual = [_apply_linear(operation, layer, batch) for batch in x]
    outputs, output_clip = ranges.fit_output(task, target, actual, shortcut and shortcut[1])
    if outputs is not None:
        layer = dataclasses.replace(layer, outputs=outputs)
        actual = [_fake_quant(batch, outputs) for batch in actual]
        if not outputs.scale.ndim:
            grids[site.output] = outputs
    layer = dataclasses.replace(layer, inputs=inputs)
    output_sqnr_db = _sqnr_db(ranges.activation_of(site), float_output, actual)
    float_values = [moved(site, batch) for batch in float_output]
    streams.write(site.output, float_values, [moved(site, batch) for batch in actual])
    return Fit(layer, weight_sqnr_db, output_sqnr_db, weight_clip, input_clip, output_clip)


def _read_shortcut(site: Site, streams: Streams) -> tuple[Arrays, Arrays] | None:
    """What a layer's output is added to, where that is known by now: (float, quantized)."""
    if site.shortcut is None or site.movement or not streams.holds(site.shortcut.value):
        return None
    return streams.read(site.shortcut.value)


def _fit_kernel(
    task: Task, x: Arrays, goal: Goal, folded: Folded, inputs: QParams | None
) -> tuple[QuantizedLayer, float, float | None]:
    """Rounds kernel and bias: (layer, SQNR of the kernel in dB, share of the range kept)."""
    recipe, operation = task.recipe, task.site.layer.operation
    if recipe.weights is None:
        return QuantizedLayer(*folded, None, inputs, None, None), math.inf, None
    seen = x if inputs is None else [_fake_quant(batch, inputs) for batch in x]
    stride = patch_stride(operation, seen, MOMENT_PATCHES)
    moments = observers.observe(observers.moments(operation, stride), seen)
    if recipe.bias_correction:  # the bias takes up the means, the kernel answers for the rest
        moments = observers.centered(moments)
    steps = min(recipe.reconstructions, 1 if goal.activation is ranges.identity else math.inf)
    for _ in range(int(steps)):
        folded = refit(operation, folded, moments, seen, goal, stride, recipe.bias_correction)
    how = (recipe.weights, recipe.range_method, recipe.rounding, recipe.sweeps, task.grid)
    codes, weights, sqnr, clip = _round_kernel(*how, folded.kernel, moments.hessian)
    layer = QuantizedLayer(codes, folded.bias, weights, inputs, None, None)
    layer = dataclasses.replace(layer, bias=_quantize_bias(operation, layer, folded.bias))
    return layer, float(sqnr), float(clip)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _round_kernel(
    spec: QuantSpec,
    range_method: RangeMethod,
    rounding: Rounding,
    sweeps: int,
    grid: search.Grid,
    kernel: jax.Array,
    hessian: jax.Array,
) -> tuple[jax.Array, QParams, jax.Array, jax.Array]:
    """Rounds a kernel: (codes, qparams, SQNR in dB, share of the range kept).

    Compiled once per shape and format of kernels, whatever else differs between layers.
    """
    weights = search.search_weights(kernel, hessian, spec, range_method, grid)
    widest = search.search_weights(kernel, hessian, spec, "absmax")
    if rounding == "gptq":
        codes = round_gptq(kernel, hessian, weights)
    else:
        codes = round_nearest(kernel, weights)
    if sweeps:
        codes, weights = coordinate_sweeps(codes, kernel, hessian, weights, sweeps)
    values = dequantize(codes, elementwise(weights, kernel.shape[1]))
    return codes, weights, sqnr_db(kernel, values), jnp.mean(weights.scale / widest.scale)


@partial(jax.jit, static_argnums=0)
def _shift_bias(operation: Linear, layer: QuantizedLayer, shift: jax.Array) -> QuantizedLayer:
    bias = quantize_bias(operation, layer, dequantized_bias(operation, layer) + shift)
    return dataclasses.replace(layer, bias=bias)


_quantize_bias = jax.jit(quantize_bias, static_argnums=0)


def _fit_activated(task: Task, fit: Fit, streams: Streams, grids: dict[core.Var, QParams]) -> Fit:
    """Fits the range of a layer's output after its activation."""
    spec, position = task.recipe.outputs, task.recipe.output_position
    is_already_done = position == "both" and not task.site.activation
    if spec is None or position == "pre_activation" or is_already_done:
        return fit
    floats, values = streams.read(task.site.activated)
    activated, clip = ranges.fit_activated(task, floats, values)
    grids[task.site.activated] = activated
    streams.write(task.site.activated, floats, [_fake_quant(v, activated) for v in values])
    layer = dataclasses.replace(fit.layer, activated=activated)
    return fit._replace(layer=layer, output_clip=fit.output_clip or clip)


_apply_linear = jax.jit(apply_linear, static_argnums=0)
_fake_quant = jax.jit(fake_quant)


@partial(jax.jit, static_argnums=0)
def _channel_sums(operation: Linear, y: jax.Array) -> jax.Array:
    kept = {axis % y.ndim for axis in operation.channel_axes}
    return y.sum([axis for axis in range(y.ndim) if axis not in kept]).reshape(-1)


def _channel_means(operation: Linear, values: Arrays) -> jax.Array:
    """The mean of each output channel, float32[groups * channels]."""
    sums = jnp.sum(jnp.stack([_channel_sums(operation, batch) for batch in values]), axis=0)
    count = sum(batch.size for batch in values) // len(sums)
    return sums / count


@partial(jax.jit, static_argnums=0)
def _energies(
    activation: Callable[[jax.Array], jax.Array], target: jax.Array, actual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    target, actual = activation(target), activation(actual)
    return jnp.sum(jnp.square(target)), jnp.sum(jnp.square(target - actual))


def _sqnr_db(activation: Callable[[jax.Array], jax.Array], target: Arrays, actual: Arrays) -> float:
    energies = [_energies(activation, z, z_hat) for z, z_hat in zip(target, actual, strict=True)]
    signal, noise = (math.fsum(map(float, column)) for column in zip(*energies, strict=True))
    return 10 * math.log10(signal / noise) if noise and signal else math.inf
