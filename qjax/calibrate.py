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
import numpy as np
from jax import lax
from jax.extend import core

from qjax import interpret, observers, search
from qjax.affine import QParams, affine_qparams, dequantize, fake_quant, sqnr_db
from qjax.emit import Activated, moved
from qjax.fold import Folded, apply_folded
from qjax.layers import Network, Site, keeps_codes
from qjax.linear import Linear
from qjax.progress import Progress
from qjax.quantized import (
    QuantizedLayer,
    apply_linear,
    dequantized_bias,
    quantize_bias,
)
from qjax.reconstruct import Goal, lacking, refit
from qjax.rounding import coordinate_sweeps, elementwise, round_gptq, round_nearest
from qjax.spec import LayerRecipe, QuantSpec, RangeMethod, Recipe, Rounding
from qjax.streams import Streams, cut

# Samples per layer, spread evenly over all calibration images and positions.
MOMENT_PATCHES = 2**16  # for the second moments of its input
SAMPLED_PATCHES = 2**12  # for the search of its input range
SAMPLED_OUTPUTS = 2**18  # for the search of its output range
PERCENT = 99.9  # of the values, that the `percentile` range keeps

Arrays = list[jax.Array]  # one per calibration batch


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
    for var in interpret.variables(equation.invars):
        if var in grids and keeps_codes(equation, var, float(grids[var].range[1])):
            grids[equation.outvars[0]] = grids[var]


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


def _fit_layer(task: Task, folded: Folded, streams: Streams, grids: dict[core.Var, QParams]) -> Fit:
    """Fits a layer up to its pre-activation output and writes that to the streams."""
    site, operation = task.site, task.site.layer.operation
    x_float, x = streams.read(site.input)
    float_output = [apply_folded(operation, folded, batch) for batch in x_float]
    shortcut = _read_shortcut(site, streams)
    added, activation = [None] * len(x), _KNOWN.get(site.layer.activation, _identity)
    target = float_output
    if shortcut is not None:  # the layer's share of the float sum z + s, where the other one is ŝ
        added, activation = shortcut[1], _summed_activation(site)
        target = [z + (s - s_hat) for z, s, s_hat in zip(target, *shortcut, strict=True)]
    goal = Goal(target, added, activation)
    inputs, input_clip = _fit_input(task, x, folded, grids.get(site.input))
    layer, weight_sqnr_db, weight_clip = _fit_kernel(task, x, goal, folded, inputs)
    actual = [_apply_linear(operation, layer, batch) for batch in x]
    if task.recipe.bias_correction and (inputs is not None or layer.weights is not None):
        layer = _shift_bias(operation, layer, _channel_means(operation, lacking(goal, actual)))
        actual = [_apply_linear(operation, layer, batch) for batch in x]
    outputs, output_clip = _fit_output(task, target, actual, shortcut and shortcut[1])
    if outputs is not None:
        layer = dataclasses.replace(layer, outputs=outputs)
        actual = [_fake_quant(batch, outputs) for batch in actual]
        grids[site.output] = outputs
    output_sqnr_db = _sqnr_db(_activation(site), float_output, actual)
    float_values = [moved(site, batch) for batch in float_output]
    streams.write(site.output, float_values, [moved(site, batch) for batch in actual])
    return Fit(layer, weight_sqnr_db, output_sqnr_db, weight_clip, input_clip, output_clip)


def _read_shortcut(site: Site, streams: Streams) -> tuple[Arrays, Arrays] | None:
    """What a layer's output is added to, where that is known by now: (float, quantized)."""
    if site.shortcut is None or site.movement or not streams.holds(site.shortcut.value):
        return None
    return streams.read(site.shortcut.value)


def _fit_input(
    task: Task, x: Arrays, folded: Folded, grid: QParams | None
) -> tuple[QParams | None, float | None]:
    spec = task.recipe.inputs
    if spec is None:
        return None, None
    if grid is not None and (grid.qmin, grid.qmax) == (spec.qmin, spec.qmax):
        return grid, 1.0  # the values are codes of the output before: nothing is lost

    def searched(extremes: search.Range) -> QParams:
        patches = _sampled_patches(task.site.layer.operation, x)
        method = task.recipe.range_method
        return search.search_input(patches, folded.kernel, extremes, spec, method, task.grid)

    extremes = observers.observe(observers.min_max(), x)
    return fit_range(task.recipe.range_method, spec, x, extremes, searched, task.grid)


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
    steps = min(recipe.reconstructions, 1 if goal.activation is _identity else math.inf)
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


def _fit_output(
    task: Task, target: Arrays, actual: Arrays, shortcut: Arrays | None
) -> tuple[QParams | None, float | None]:
    spec, method = task.recipe.outputs, task.recipe.range_method
    if spec is None or task.recipe.output_position == "post_activation":
        return None, None
    low, high = observers.observe(observers.min_max(), actual)
    activation = _identity
    if method == "output_mse":
        activation = _activation(task.site) if shortcut is None else _summed_activation(task.site)
    if shortcut is None and activation in (jax.nn.relu, jax.nn.relu6):
        low = jnp.zeros_like(low)
    if shortcut is None and activation is jax.nn.relu6:
        high = jnp.minimum(high, 6)

    def searched(extremes: search.Range) -> QParams:
        if task.is_judged_by_softmax:
            z, z_hat = (
                jnp.concatenate([moved(task.site, batch) for batch in values])
                for values in (target, actual)
            )
            return search.search_logits(z, z_hat, extremes, spec, task.grid)
        # An activation of unknown form is only known at the shape of a whole batch.
        is_pointwise = activation in (_identity, jax.nn.relu, jax.nn.relu6)
        z, z_hat = (_sampled(v) if is_pointwise else v[0] for v in (target, actual))
        added = None if shortcut is None else _sampled(shortcut)
        return search.search_output(z, z_hat, extremes, spec, activation, task.grid, added)

    outputs, clip = fit_range(method, spec, actual, (low, high), searched, task.grid)
    return _with_exact_products(outputs), clip


def _with_exact_products(qparams: QParams) -> QParams:
    """Rounds a scale to 16 significant bits: times a code of 8 bits it is exact in float32.

    The sum of two such values is rounded once, in whatever way a compiler fuses it, so that every
    evaluation of a residual sum is the same.
    """
    return dataclasses.replace(qparams, scale=lax.reduce_precision(qparams.scale, 8, 15))


def _activation(site: Site) -> Callable[[jax.Array], jax.Array]:
    return _KNOWN.get(site.layer.activation) or partial(_activate, site)


def _summed_activation(site: Site) -> Callable[[jax.Array], jax.Array]:
    """What follows the sum of a layer's output and its shortcut; the identity if unknown."""
    assert site.shortcut is not None
    return _KNOWN.get(site.shortcut.activation, _identity)


def _identity(x: jax.Array) -> jax.Array:
    return x


_KNOWN = {"none": _identity, "relu": jax.nn.relu, "relu6": jax.nn.relu6}


def _activate(site: Site, z: jax.Array) -> jax.Array:
    env = {site.output: moved(site, z)}
    for equation in site.activation:
        interpret.evaluate_equation(equation, env)
    return env[site.activated]


def _fit_activated(task: Task, fit: Fit, streams: Streams, grids: dict[core.Var, QParams]) -> Fit:
    """Fits the range of a layer's output after its activation."""
    spec, position = task.recipe.outputs, task.recipe.output_position
    is_already_done = position == "both" and not task.site.activation
    if spec is None or position == "pre_activation" or is_already_done:
        return fit
    floats, values = streams.read(task.site.activated)
    method = task.recipe.range_method

    def searched(extremes: search.Range) -> QParams:
        if task.is_judged_by_softmax:
            z, z_hat = jnp.concatenate(floats), jnp.concatenate(values)
            return search.search_logits(z, z_hat, extremes, spec, task.grid)
        samples = _sampled(floats), _sampled(values)
        return search.search_output(*samples, extremes, spec, _identity, task.grid)

    extremes = observers.observe(observers.min_max(), values)
    activated, clip = fit_range(method, spec, values, extremes, searched, task.grid)
    activated = _with_exact_products(activated)
    grids[task.site.activated] = activated
    streams.write(task.site.activated, floats, [_fake_quant(v, activated) for v in values])
    layer = dataclasses.replace(fit.layer, activated=activated)
    return fit._replace(layer=layer, output_clip=fit.output_clip or clip)


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
    size, limit = values[0].size, SAMPLED_OUTPUTS // len(values)
    if size <= limit:
        return jnp.concatenate([batch.reshape(-1) for batch in values])
    places = np.random.default_rng(size).integers(size, size=limit)
    return jnp.concatenate([batch.reshape(-1)[places] for batch in values])


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
