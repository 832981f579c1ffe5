"""Tensors of a layer as a range objective sees them; see `qjax.objectives.base.Sample`.

They exist while a function is traced, and compute what an objective asks of them and nothing else.
"""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qjax.fit import observers
from qjax.formats.affine import magnitude
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import NONE, Activation
from qjax.objectives.base import Range
from qjax.objectives.divergence import HISTOGRAM_BINS, without_spike_at_zero
from qjax.rounding.metric import damped


def patch_groups(patch: int, spec: QuantSpec) -> int:
    """How many scales the elements of a patch share among them."""
    return -(-patch // spec.group_size) if spec.granularity == "per_group" else 1


def split_patch(kernel: jax.Array, groups: int) -> jax.Array:
    """Splits the patch axis: [g, patch, m] to [g, groups, size, m], padded with zeros."""
    size = -(-kernel.shape[1] // groups)
    padding = groups * size - kernel.shape[1]
    if padding:
        kernel = jnp.pad(kernel, [(0, 0), (0, padding), (0, 0)])
    return kernel.reshape(kernel.shape[0], groups, size, kernel.shape[2])


def join_patch(blocks: jax.Array, patch: int) -> jax.Array:
    """Undoes `split_patch`: [g, groups, size, m] to [g, patch, m]."""
    return blocks.reshape(blocks.shape[0], -1, blocks.shape[3])[:, :patch]


def diagonal_blocks(hessian: jax.Array, groups: int) -> jax.Array:
    """The blocks on the diagonal: [g, patch, patch] to [g, groups, size, size]."""
    if groups == 1:
        return hessian[:, None]
    rows = split_patch(hessian, groups)
    columns = split_patch(rows.reshape(-1, *rows.shape[2:]).transpose(0, 2, 1), groups)
    columns = columns.reshape(rows.shape[0], groups, groups, *columns.shape[2:])
    return jnp.moveaxis(jnp.diagonal(columns, axis1=1, axis2=2), -1, 1)


def kernel_loss(error: jax.Array, hessian: jax.Array | None) -> jax.Array:
    """The mean squared output error that a kernel error causes: eᵀ H e per output channel.

    Args:
      error: ŵ − w, float[..., patch, channels].
      hessian: E[x xᵀ], float[..., patch, patch]; None stands for the identity.

    Returns:
      float[..., channels].
    """
    weighted = error if hessian is None else jnp.matmul(hessian, error, precision="highest")
    return jnp.sum(error * weighted, axis=-2)


@dataclasses.dataclass(frozen=True)
class KernelSample:
    """A kernel, in blocks of elements that share a scale.

    The error that a group of elements shares with the others is left out.

    Attributes:
      kernel: float32[groups, patch, channels], of a magnitude near 1.
      spec: its number format; its granularity says what shares a scale.
      hessian: E[x xᵀ], float32[groups, patch, patch]; None if no objective asks for it.
    """

    kernel: jax.Array
    spec: QuantSpec
    hessian: jax.Array | None = None

    unit: ClassVar[float] = 1.0

    @cached_property
    def values(self) -> jax.Array:
        """The blocks, float32[groups, patch groups, size, channels]."""
        return split_patch(self.kernel.astype(jnp.float32), self._groups)

    @property
    def target(self) -> jax.Array:
        """The blocks."""
        return self.values

    @property
    def nbytes(self) -> int:
        """The bytes that one candidate needs at least."""
        return self.values.nbytes

    @property
    def _groups(self) -> int:
        return patch_groups(self.kernel.shape[1], self.spec)

    @property
    def _axes(self) -> int | None:
        return None if self.spec.granularity == "per_tensor" else 2

    def total(self, errors: jax.Array) -> jax.Array:
        """Sums over the elements that share a scale."""
        sums = jnp.sum(errors, axis=2, keepdims=True)
        return sums if self._axes == 2 else jnp.sum(sums, keepdims=True)

    @cached_property
    def _extremes(self) -> Range:
        low = jnp.minimum(jnp.min(self.values, self._axes, keepdims=True), 0)
        return low, jnp.maximum(jnp.max(self.values, self._axes, keepdims=True), 0)

    def extremes(self) -> Range:
        """The least and the greatest value of each scale, 0 among them."""
        return self._extremes

    def central(self, percent: float) -> Range:
        """The extremes, cut at the magnitude that this share of the values keeps to."""
        magnitude = jnp.percentile(jnp.abs(self.values), percent, self._axes, keepdims=True)
        low, high = self._extremes
        return jnp.maximum(low, -magnitude), jnp.minimum(high, magnitude)

    def output_error(self, values_hat: jax.Array) -> jax.Array:
        """(ŵ − w)ᵀ H (ŵ − w) per output channel."""
        if self.hessian is None:
            raise ValueError("the second moments of the layer's input are needed, and not there.")
        metric = diagonal_blocks(self.hessian, self._groups)
        losses = kernel_loss(values_hat - self.values, metric)[:, :, None]
        return losses if self._axes == 2 else jnp.sum(losses, keepdims=True)

    @property
    def importance(self) -> jax.Array:
        """E[x_k²] of each element's input over their mean: [groups, patch groups, size, 1].

        It is damped as H is for rounding, 1 without moments, and 0 for padding.
        """
        weights = jnp.ones((self.kernel.shape[0], self.kernel.shape[1], 1), jnp.float32)
        if self.hessian is not None:
            diagonal = jnp.diagonal(damped(self.hessian), axis1=1, axis2=2)
            weights = (diagonal / jnp.mean(diagonal, axis=1, keepdims=True))[..., None]
        return split_patch(weights, self._groups)

    def distribution(self) -> tuple[jax.Array, jax.Array]:
        """Not for a scale alone, which has too few values."""
        return self.pooled().distribution()

    def pooled(self) -> "PooledKernel":
        """All values together, each divided by the largest magnitude of its scale."""
        low, high = self._extremes
        largest = jnp.maximum(jnp.maximum(-low, high), jnp.finfo(jnp.float32).tiny)
        return PooledKernel(self.values / largest)


@dataclasses.dataclass(frozen=True)
class PooledKernel:
    """The values of a kernel in units of the largest magnitude of their scales."""

    values: jax.Array

    unit: ClassVar[float] = 1.0

    @property
    def target(self) -> jax.Array:
        """The values."""
        return self.values

    @property
    def nbytes(self) -> int:
        """The bytes that one candidate needs at least."""
        return 4 * HISTOGRAM_BINS

    def total(self, errors: jax.Array) -> jax.Array:
        """The mean."""
        return jnp.mean(errors)

    def extremes(self) -> Range:
        """The least and the greatest value."""
        return self.values.min(), self.values.max()

    def distribution(self) -> tuple[jax.Array, jax.Array]:
        """The histogram of the values."""
        return without_spike_at_zero(*jnp.histogram(self.values, HISTOGRAM_BINS))


class NeedsAllValuesError(Exception):
    """An objective makes a histogram of values that are not at hand together."""


@dataclasses.dataclass(frozen=True)
class ActivationSample:
    """What input and output samples share.

    Attributes:
      stacked: all values, [batches, ...]; read for histograms alone. None where they are not at
        hand together.
      low: the least value, a scalar.
      high: the greatest.
    """

    stacked: jax.Array | None
    low: jax.Array
    high: jax.Array

    @property
    def unit(self) -> jax.Array:
        """The magnitude of the values."""
        return magnitude(jnp.maximum(-self.low, self.high))

    def total(self, errors: jax.Array) -> jax.Array:
        """The mean."""
        return jnp.mean(errors)

    def extremes(self) -> Range:
        """The least and the greatest value."""
        return self.low, self.high

    def central(self, percent: float) -> Range:
        """The range that holds this share of the values, from a histogram."""
        observer = observers.percentile(percent, self.low, self.high)
        return observers.observe_stacked(observer, self._all())

    def distribution(self) -> tuple[jax.Array, jax.Array]:
        """The histogram of all values."""
        counter = observers.histogram(self.low, self.high, bins=HISTOGRAM_BINS)
        return without_spike_at_zero(*observers.observe_stacked(counter, self._all()))

    def _all(self) -> jax.Array:
        if self.stacked is None:
            raise NeedsAllValuesError
        return self.stacked


@dataclasses.dataclass(frozen=True)
class InputSample(ActivationSample):
    """A layer's input.

    Attributes:
      patches: a sample of the patches that the kernel meets, float32[groups, patch, n].
      kernel: float32[groups, patch, channels], or a narrower one of the same norms, see `narrowed`.
    """

    patches: jax.Array
    kernel: jax.Array

    @property
    def values(self) -> jax.Array:
        """The patches."""
        return self.patches

    @property
    def target(self) -> jax.Array:
        """The patches."""
        return self.patches

    @property
    def nbytes(self) -> int:
        """The bytes that one candidate needs at least."""
        return max(self.patches.nbytes, self.kernel.nbytes)

    def output_error(self, values_hat: jax.Array) -> jax.Array:
        """E‖W·(x̂ − x)‖²."""
        kernel = self.kernel / magnitude(jnp.max(jnp.abs(self.kernel)))
        error = jnp.einsum("gkm,gkp->gmp", kernel, (values_hat - self.patches) / self.unit)
        return jnp.mean(jnp.square(error))


def narrowed(kernel: jax.Array) -> jax.Array:
    """A kernel of no more channels than a patch has elements, and as large an output.

    With Wᵀ = QR, Q of orthonormal columns, ‖Wᵀx‖ = ‖Rx‖ for every x.

    Args:
      kernel: W, float32[groups, patch, channels].

    Returns:
      Rᵀ, float32[groups, patch, patch], where that is smaller; else W.
    """
    _, patch, channels = kernel.shape
    return jnp.linalg.qr(kernel.mT, mode="r").mT if channels > patch else kernel


@dataclasses.dataclass(frozen=True)
class OutputSample(ActivationSample):
    """A layer's output, or one channel of it.

    Attributes:
      target: z, the outputs to be had.
      values: ẑ, the outputs there of the layer to be quantized, of that shape.
      shortcut: s, what is added before the activation, of that shape; None for nothing.
      activation: act, what follows the output, or the sum.
    """

    target: jax.Array
    values: jax.Array
    shortcut: jax.Array | None = None
    activation: Activation = NONE

    @property
    def nbytes(self) -> int:
        """The bytes that one candidate needs at least."""
        return max(self.target.nbytes, self.values.nbytes)

    def _shown(self, values: jax.Array) -> jax.Array:
        added = values if self.shortcut is None else values + self.shortcut
        return self.activation.function(added).astype(jnp.float32)

    def output_error(self, values_hat: jax.Array) -> jax.Array:
        """E‖act(ẑ + s) − act(z + s)‖²."""
        error = self._shown(values_hat) - self._shown(self.target)
        return jnp.mean(jnp.square(error / self.unit))


def channel_sample(target: Any, values: Any, shortcut: Any, activation: Activation) -> OutputSample:
    """The sample of one channel, whose values are all that there are of it."""
    low, high = jnp.minimum(values.min(), 0), jnp.maximum(values.max(), 0)
    stacked = values[None]
    return OutputSample(stacked, low, high, target, values, shortcut, activation)
