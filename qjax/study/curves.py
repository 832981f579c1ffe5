"""How clipping ranges are found: each cost function over the same candidate ranges, and its choice.

Candidates are α·[low, high] with [low, high] the extremes and 0 < α ≤ 1. Per output channel (or
group) the same α scales every range of the curve; a cost function chooses for each on its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.fit.moments import moments
from qjax.fit.observers import observe
from qjax.fit.ranges import extremes_of
from qjax.fit.samples import InputSample, KernelSample, OutputSample, kernel_loss
from qjax.fit.sampling import MOMENT_PATCHES, coprime_stride, patch_stride, sampled_patches
from qjax.fit.search import Candidates, least, widest
from qjax.formats.affine import sqnr_db
from qjax.formats.base import elementwise
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import Activation
from qjax.graph.layers import Site
from qjax.graph.operation import Linear
from qjax.objectives.divergence import KL, divergence
from qjax.objectives.errors import MSE, OUTPUT_MSE
from qjax.objectives.table import OBJECTIVES
from qjax.programs import program
from qjax.recipe import LayerRecipe
from qjax.run.layer import QuantizedLayer, apply_layer

SHARES = np.arange(1, 101, dtype=np.float32) / 100
SEARCH = Candidates(len(SHARES), refinements=0)
SAMPLED_OUTPUTS = 2**16


class ChosenRange(NamedTuple):
    """What one cost function chooses.

    Attributes:
      method: the name of its objective.
      share: its range's share of the extremes' range, mean over scales; for the output of the part
        that the activation lets through.
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
      losses: by objective: `mse` and `output_mse` as noise over signal, `kl` in nats.
      choices: one per objective of the table.
    """

    tensor: str
    bits: int
    shares: tuple[float, ...]
    losses: Mapping[str, tuple[float, ...]]
    choices: tuple[ChosenRange, ...]

    @property
    def best(self) -> ChosenRange:
        """The choice with the least error of the layer's output."""
        return max(self.choices, key=lambda choice: choice.output_sqnr_db)


def layer_curves(
    site: Site, folded: QuantizedLayer, x: jax.Array, recipe: LayerRecipe
) -> tuple[Curves, ...]:
    """Evaluates the cost functions for a layer's weights, input and output, each alone.

    Weights are rounded to nearest. An activation of unknown form counts as none. Input and output
    have one range per tensor.

    Args:
      site: the layer.
      folded: its float kernel and bias, see `tap.float_layers`.
      x: the input that the float network gives it on calibration images.
      recipe: the formats; what it leaves in float, or to run time, has no curves.

    Returns:
      `Curves` of what the recipe quantizes, in the order weights, input, output.
    """
    found, layer = [], site.layer
    if recipe.weights is not None:
        stride = patch_stride(layer.operation, x[None], MOMENT_PATCHES)
        measured = _weight_curves(layer.operation, stride, recipe.weights, folded.kernel, x)
        found.append(_curves("weights", recipe.weights, measured))
    if recipe.inputs is not None and not recipe.inputs.is_dynamic:
        measured = _input_curves(layer.operation, recipe.inputs, folded.kernel, x)
        found.append(_curves("input", recipe.inputs, measured))
    if recipe.outputs is not None and not recipe.outputs.is_dynamic:
        measured = _output_curves(layer.operation, site.activation.shown, recipe.outputs, folded, x)
        found.append(_curves("output", recipe.outputs, measured))
    return tuple(found)


class _Measured(NamedTuple):
    """The curves of one tensor as arrays.

    Attributes:
      losses: by objective, float[shares].
      choices: by objective, its share of the extremes' range, and the SQNR of the tensor and of
        the layer's output in that range, in dB.
    """

    losses: Mapping[str, jax.Array]
    choices: Mapping[str, tuple[jax.Array, jax.Array, jax.Array]]


def _curves(tensor: str, spec: QuantSpec, measured: _Measured) -> Curves:
    losses, chosen = jax.device_get((measured.losses, measured.choices))
    choices = [ChosenRange(method, *map(float, chosen[method])) for method in OBJECTIVES]
    lines = {name: tuple(map(float, losses[name])) for name in losses}
    return Curves(tensor, spec.bits, tuple(map(float, SHARES)), lines, tuple(choices))


Quality = Callable[[Any], tuple[jax.Array, jax.Array]]


def _measured(sample: Any, spec: QuantSpec, quality: Quality, units: Any) -> _Measured:
    """Follows the objectives over the shares, and asks each for its choice.

    Args:
      sample: the tensor.
      spec: its number format.
      quality: of a format: SQNR of the tensor and of the layer's output, in dB.
      units: the sample whose distribution the divergence compares.
    """

    def at(share: jax.Array) -> tuple[jax.Array, ...]:
        tensor, output = quality(_shrunk(sample, spec, share))
        low, high = units.extremes()
        kl = divergence(units.distribution(), spec.cover(share * low, share * high))
        return 10.0 ** (-tensor / 10), 10.0 ** (-output / 10), kl

    values = jax.lax.map(at, jnp.asarray(SHARES))
    losses = dict(zip((MSE.name, OUTPUT_MSE.name, KL.name), values, strict=True))
    chosen = [least(objective, sample, spec, SEARCH) for objective in OBJECTIVES.values()]
    covering = widest(sample, spec)

    def judged(format: Any) -> tuple[jax.Array, ...]:
        return jnp.mean(format.step / covering.step), *quality(format)

    choices = jax.lax.map(judged, jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen))
    return _Measured(losses, dict(zip(OBJECTIVES, zip(*choices, strict=True), strict=True)))


def _shrunk(sample: Any, spec: QuantSpec, share: jax.Array) -> Any:
    low, high = sample.extremes()
    format = spec.cover(share * low, share * high)
    return jax.tree.map(lambda leaf: leaf[:, :, 0] if leaf.ndim > 2 else leaf, format)


@program(static_argnums=(0, 1, 2))
def _weight_curves(
    operation: Linear, stride: int, spec: QuantSpec, kernel: jax.Array, x: jax.Array
) -> _Measured:
    hessian = observe(moments(operation, stride), [x]).hessian
    sample = KernelSample(kernel, spec, hessian)

    def quality(format: Any) -> tuple[jax.Array, jax.Array]:
        """SQNR of the kernel and of the layer's output before its bias."""
        kernel_hat = elementwise(format, kernel.shape[1]).project(kernel)
        signal, noise = (jnp.sum(kernel_loss(v, hessian)) for v in (kernel, kernel_hat - kernel))
        output = jnp.where(noise > 0, 10 * jnp.log10(signal / noise), jnp.inf)
        return sqnr_db(kernel, kernel_hat), output

    return _measured(sample, spec, quality, sample.pooled())


@program(static_argnums=(0, 1))
def _input_curves(operation: Linear, spec: QuantSpec, kernel: jax.Array, x: jax.Array) -> _Measured:
    patches = sampled_patches(operation, x[None])
    sample = InputSample(x[None], *extremes_of(x), patches, kernel)

    def outputs(patches: jax.Array) -> jax.Array:
        return jnp.einsum("gkm,gkp->gmp", kernel, patches)

    def quality(format: Any) -> tuple[jax.Array, jax.Array]:
        patches_hat = format.project(patches)
        return sqnr_db(patches, patches_hat), sqnr_db(outputs(patches), outputs(patches_hat))

    return _measured(sample, spec, quality, sample)


@program(static_argnums=(0, 1, 2))
def _output_curves(
    operation: Linear, activation: Activation, spec: QuantSpec, folded: QuantizedLayer, x: jax.Array
) -> _Measured:
    outputs = apply_layer(operation, folded, x).reshape(-1)
    z = outputs[:: coprime_stride(outputs.size, SAMPLED_OUTPUTS)]
    z, act = jnp.clip(z, *activation.bounds), activation.function
    sample = OutputSample(z[None], *extremes_of(z), z, z, None, activation)

    def quality(format: Any) -> tuple[jax.Array, jax.Array]:
        z_hat = format.project(z)
        return sqnr_db(z, z_hat), sqnr_db(act(z), act(z_hat))

    return _measured(sample, spec, quality, sample)
