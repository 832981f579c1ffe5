"""How clipping ranges are found: each cost function over the same candidate ranges, and its choice.

Candidates are α·[low, high] with [low, high] the extremes and 0 < α ≤ 1. Per output channel (or
group) the same α scales every range of the curve; a cost function chooses for each on its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from qjax.fit import observers, search
from qjax.fit.ranges import (
    MOMENT_PATCHES,
    SAMPLED_PATCHES,
    coprime_stride,
    fit_range,
    identity,
    patch_stride,
)
from qjax.fit.rounding import elementwise, round_nearest
from qjax.fit.search import entropy_losses, kernel_loss, search_input, search_output, search_weights
from qjax.formats.affine import QParams, affine_qparams, dequantize, fake_quant, sqnr_db
from qjax.formats.spec import LayerRecipe, QuantSpec, RangeMethod
from qjax.graph.layers import Layer
from qjax.run.layer import QuantizedLayer, apply_layer

METHODS: tuple[str, ...] = get_args(RangeMethod)
GRID = 100
SEARCH = search.Grid(GRID, refinements=0)
SAMPLED_OUTPUTS = 2**16


class Choice(NamedTuple):
    """What one cost function chooses.

    Attributes:
      method: absmax, percentile, mse, output_mse or kl.
      share: its range's share of the extremes' range, mean over scales; for the output by
        `output_mse` of the part that the activation lets through.
      tensor_sqnr_db: of the tensor in that range.
      output_sqnr_db: of the layer's output after the activation, all else in float.
    """

    method: str
    share: float
    tensor_sqnr_db: float
    output_sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Curves:
    """The cost functions of one tensor of one layer.

    Attributes:
      tensor: weights, input or output.
      bits: width of its codes.
      shares: the candidates α.
      losses: by cost function: `mse` and `output_mse` as noise over signal, `kl` in nats.
      choices: one per method of `spec.RangeMethod`.
    """

    tensor: str
    bits: int
    shares: tuple[float, ...]
    losses: Mapping[str, tuple[float, ...]]
    choices: tuple[Choice, ...]

    @property
    def best(self) -> Choice:
        """The choice with the least error of the layer's output."""
        return max(self.choices, key=lambda choice: choice.output_sqnr_db)


def layer_curves(
    layer: Layer, folded: QuantizedLayer, x: jax.Array, recipe: LayerRecipe
) -> tuple[Curves, ...]:
    """Evaluates the cost functions for a layer's weights, input and output, each alone.

    Weights are rounded to nearest. An activation of unknown form counts as none. Input and output
    have one range per tensor.

    Args:
      layer: the layer.
      folded: its float kernel and bias, see `tap.float_layers`.
      x: the input that the float network gives it on calibration images.
      recipe: the formats; what it leaves in float has no curves.

    Returns:
      `Curves` of what the recipe quantizes, in the order weights, input, output.
    """
    found = []
    if recipe.weights is not None:
        found.append(_weight_curves(layer, folded.kernel, x, recipe.weights))
    if recipe.inputs is not None:
        found.append(_input_curves(layer, folded.kernel, x, recipe.inputs))
    if recipe.outputs is not None:
        found.append(_output_curves(layer, folded, x, recipe.outputs))
    return tuple(found)


def _curves(
    tensor: str, spec: QuantSpec, losses: Mapping[str, jax.Array], choices: list[Choice]
) -> Curves:
    alphas = tuple(map(float, _alphas()))
    curves = {name: tuple(map(float, values)) for name, values in losses.items()}
    return Curves(tensor, spec.bits, alphas, curves, tuple(choices))


def _alphas() -> jax.Array:
    return jnp.arange(1, GRID + 1, dtype=jnp.float32) / GRID


def _noise(sqnr: Any) -> jax.Array:
    return 10.0 ** (-sqnr / 10)


# ---- Weights


def _weight_curves(layer: Layer, kernel: jax.Array, x: jax.Array, spec: QuantSpec) -> Curves:
    stride = patch_stride(layer.operation, [x], MOMENT_PATCHES)
    hessian = observers.observe(observers.moments(layer.operation, stride), [x]).hessian
    losses = _weight_losses(kernel, hessian, spec)
    widest = search_weights(kernel, hessian, spec, "absmax")
    choices = []
    for method in METHODS:
        qparams = search_weights(kernel, hessian, spec, method, SEARCH)
        quality = map(float, _weight_quality(kernel, hessian, qparams))
        share = float(jnp.mean(qparams.scale / widest.scale))
        choices.append(Choice(method, share, *quality))
    return _curves("weights", spec, losses, choices)


@jax.jit
def _weight_quality(
    kernel: jax.Array, hessian: jax.Array, qparams: QParams
) -> tuple[jax.Array, jax.Array]:
    """SQNR of the kernel and of the layer's output before its bias, in dB."""
    rounded = round_nearest(kernel, qparams)
    kernel_hat = dequantize(rounded, elementwise(qparams, kernel.shape[1]))
    signal, noise = (jnp.sum(kernel_loss(v, hessian)) for v in (kernel, kernel_hat - kernel))
    output = jnp.where(noise > 0, 10 * jnp.log10(signal / noise), jnp.inf)
    return sqnr_db(kernel, kernel_hat), output


@partial(jax.jit, static_argnames="spec")
def _weight_losses(kernel: jax.Array, hessian: jax.Array, spec: QuantSpec) -> dict[str, jax.Array]:
    widest = search_weights(kernel, hessian, spec, "absmax")
    full = elementwise(widest, kernel.shape[1])
    low, high = full.range
    relative = kernel / jnp.maximum(-low, high)
    histogram = jnp.histogram(relative, search.HISTOGRAM_BINS)
    extremes = relative.min(), relative.max()

    def quality(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _weight_quality(
            kernel, hessian, dataclasses.replace(widest, scale=alpha * widest.scale)
        )

    tensor, output = jax.lax.map(quality, _alphas())
    return {
        "mse": _noise(tensor),
        "output_mse": _noise(output),
        "kl": entropy_losses(histogram, extremes, spec, _alphas()),
    }


# ---- Activations


def _input_curves(layer: Layer, kernel: jax.Array, x: jax.Array, spec: QuantSpec) -> Curves:
    stride = patch_stride(layer.operation, [x], SAMPLED_PATCHES)
    patches = layer.operation.patches(x.astype(jnp.float32), stride)
    extremes = observers.observe(observers.min_max(), [x])
    data = (patches, jnp.einsum("pgk,gkm->pgm", patches, kernel), kernel)

    def searched(method: str) -> Callable[[search.Range], QParams]:
        return lambda ends: search_input(patches, kernel, ends, spec, method, SEARCH)

    found = {m: fit_range(m, spec, [x], extremes, searched(m), SEARCH) for m in METHODS}
    losses = _losses(_input_quality, data, _histogram(x, extremes), (extremes, extremes), spec)
    choices = [
        Choice(method, share, *map(float, jax.jit(_input_quality)(data, qparams)))
        for method, (qparams, share) in found.items()
    ]
    return _curves("input", spec, losses, choices)


def _input_quality(data: Any, qparams: QParams) -> tuple[jax.Array, jax.Array]:
    patches, output, kernel = data
    patches_hat = fake_quant(patches, qparams)
    output_hat = jnp.einsum("pgk,gkm->pgm", patches_hat, kernel)
    return sqnr_db(patches, patches_hat), sqnr_db(output, output_hat)


_ACTIVATIONS = {"relu": jax.nn.relu, "relu6": jax.nn.relu6}


def _output_curves(layer: Layer, folded: QuantizedLayer, x: jax.Array, spec: QuantSpec) -> Curves:
    z = jax.jit(apply_layer, static_argnums=0)(layer.operation, folded, x).reshape(-1)
    sample = z[:: coprime_stride(z.size, SAMPLED_OUTPUTS)]
    activation = _ACTIVATIONS.get(layer.activation, identity)
    extremes = observers.observe(observers.min_max(), [sample])
    low, high = extremes
    if activation is not identity:
        low = jnp.zeros_like(low)
    if activation is jax.nn.relu6:
        high = jnp.minimum(high, 6)
    seen = (low, high)  # all that the activation lets through
    quality = _QUALITY[activation]

    def ends(method: str) -> search.Range:
        return seen if method == "output_mse" else extremes

    def searched(method: str) -> Callable[[search.Range], QParams]:
        act = activation if method == "output_mse" else identity
        return lambda ends: search_output(sample, sample, ends, spec, act, SEARCH)

    found = {m: fit_range(m, spec, [sample], ends(m), searched(m), SEARCH) for m in METHODS}
    losses = _losses(quality, sample, _histogram(sample, extremes), (extremes, seen), spec)
    choices = [
        Choice(method, share, *map(float, jax.jit(quality)(sample, qparams)))
        for method, (qparams, share) in found.items()
    ]
    return _curves("output", spec, losses, choices)


def _output_quality(activation: Callable[[jax.Array], jax.Array], z: Any, qparams: QParams) -> Any:
    z_hat = fake_quant(z, qparams)
    return sqnr_db(z, z_hat), sqnr_db(activation(z), activation(z_hat))


_QUALITY = {a: partial(_output_quality, a) for a in (identity, *_ACTIVATIONS.values())}


def _histogram(values: jax.Array, extremes: search.Range) -> Any:
    return observers.observe(observers.histogram(*extremes, bins=search.HISTOGRAM_BINS), [values])


@partial(jax.jit, static_argnames=("quality", "spec"))
def _losses(
    quality: Callable[..., Any], data: Any, histogram: Any, ends: Any, spec: QuantSpec
) -> dict[str, jax.Array]:
    """The curves of an activation; `ends` are the extremes of the tensor's and the output's."""
    of_tensor, of_output = ends

    def at(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        tensor, output = (
            quality(data, affine_qparams(alpha * low, alpha * high, spec))
            for low, high in (of_tensor, of_output)
        )
        return tensor[0], output[1]

    tensor, output = jax.lax.map(at, _alphas())
    return {
        "mse": _noise(tensor),
        "output_mse": _noise(output),
        "kl": entropy_losses(histogram, of_tensor, spec, _alphas()),
    }
