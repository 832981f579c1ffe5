"""Affine quantization of plain arrays: real = scale * (code - zero_point)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.spec import QuantSpec


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QParams:
    """The affine map between codes and real values.

    Attributes:
      scale: float32, real units per code, positive; of the rank of the data, 1 on shared axes.
      zero_point: int32, the code of real 0; same shape as `scale`.
      qmin: smallest code, inclusive (static).
      qmax: largest code, inclusive (static).
    """

    scale: jax.Array
    zero_point: jax.Array
    qmin: int = _static()
    qmax: int = _static()

    @property
    def bits(self) -> int:
        """The width of a code."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def dtype(self) -> Any:
        """The narrowest of int8, uint8, int16, uint16 that holds every code."""
        width = 8 if self.bits <= 8 else 16
        return jnp.dtype(f"int{width}" if self.qmin < 0 else f"uint{width}")

    @property
    def inverse_scale(self) -> jax.Array:
        """Codes per real unit, 1 / scale.

        Values are multiplied by it: a compiler rewrites some divisions by `scale` to that and
        leaves others, which then round differently.
        """
        return 1 / self.scale

    @property
    def range(self) -> tuple[jax.Array, jax.Array]:
        """The smallest and the largest representable real value, each of `scale`'s shape."""
        codes = jnp.array([self.qmin, self.qmax])
        low, high = (self.scale * (code - self.zero_point).astype(jnp.float32) for code in codes)
        return low, high


def affine_qparams(low: jax.Array, high: jax.Array, spec: QuantSpec) -> QParams:
    """Finds the map that covers [low, high], with real 0 exactly representable.

    Symmetric: scale = max(|low|, |high|) / qmax, zero_point = 0. Asymmetric, with low ≤ 0 ≤ high:
    scale = (high − low) / (2^b − 1), zero_point = round(−low / scale); where low = 0 the zero point
    is 0 and the format is symmetric unsigned. A range of width 0 gets scale 1.

    Args:
      low: float[...], the smallest value to represent; values above 0 count as 0.
      high: float[...], the largest value to represent; values below 0 count as 0.
      spec: the number format.

    Returns:
      Qparams of the shape of `low` and `high`.

    References:
      Jacob et al., 2018, arXiv:1712.05877, section 2.1 and eq. 12.
    """
    low = jnp.minimum(low, 0).astype(jnp.float32)
    high = jnp.maximum(high, 0).astype(jnp.float32)
    width = jnp.maximum(-low, high) if spec.symmetric else high - low
    scale = width / (spec.qmax if spec.symmetric else spec.qmax - spec.qmin)
    scale = jnp.where(scale > jnp.finfo(jnp.float32).tiny, scale, jnp.ones_like(scale))
    zero_point = jnp.zeros_like(scale) if spec.symmetric else jnp.round(-low / scale)
    zero_point = jnp.clip(zero_point, spec.qmin, spec.qmax)
    return QParams(scale, zero_point.astype(jnp.int32), spec.qmin, spec.qmax)


def _check_rank(x: jax.Array, qparams: QParams) -> None:
    if qparams.scale.ndim not in (0, x.ndim):
        raise ValueError(
            f"`scale` must have the rank of the data, {x.ndim}, or be a scalar; got shape "
            f"{qparams.scale.shape}. Keep reduced axes with size 1."
        )


def _round_straight_through(x: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def float_codes(x: jax.Array, qparams: QParams) -> jax.Array:
    """Rounds to codes relative to the zero point, as integers in float32: x ≈ scale · codes.

    Differentiable: rounding passes the gradient through, clipping stops it.

    Args:
      x: float[...].
      qparams: scalar, or of the rank of `x`.

    Returns:
      float32[...], integers from qmin − zero_point to qmax − zero_point.

    References:
      Bengio et al., 2013, arXiv:1308.3432 (straight-through estimator).
    """
    _check_rank(x, qparams)
    return round_codes(x.astype(jnp.float32) * qparams.inverse_scale, qparams)


def round_codes(codes: jax.Array, qparams: QParams) -> jax.Array:
    """Clips and rounds codes relative to the zero point, half to even, differentiably.

    Args:
      codes: float32[...], before rounding.
      qparams: scalar, or of the rank of `codes`.

    Returns:
      float32[...], integers from qmin − zero_point to qmax − zero_point.
    """
    zero_point = qparams.zero_point.astype(jnp.float32)
    codes = jnp.clip(codes, qparams.qmin - zero_point, qparams.qmax - zero_point)
    return _round_straight_through(codes)


def quantize_array(x: jax.Array, qparams: QParams) -> jax.Array:
    """Maps real values to codes: clip(round(x / scale) + zero_point, qmin, qmax).

    Args:
      x: float[...] in real units.
      qparams: scalar, or of the rank of `x`.

    Returns:
      Codes of `x`'s shape in the narrowest integer type that holds them.

    Raises:
      ValueError: if `scale` has neither the rank of `x` nor rank 0.

    References:
      Jacob et al., 2018, arXiv:1712.05877, eq. 1.
    """
    codes = float_codes(x, qparams).astype(jnp.int32) + qparams.zero_point
    return codes.astype(qparams.dtype)


def dequantize(codes: jax.Array, qparams: QParams) -> jax.Array:
    """Maps codes to real values: x_hat = scale * (codes - zero_point).

    Args:
      codes: int[...].
      qparams: scalar, or of the rank of `codes`.

    Returns:
      float32[...] in real units.

    Raises:
      ValueError: if `scale` has neither the rank of `codes` nor rank 0.

    References:
      Jacob et al., 2018, arXiv:1712.05877, eq. 1.
    """
    _check_rank(codes, qparams)
    return qparams.scale * (codes.astype(jnp.int32) - qparams.zero_point).astype(jnp.float32)


def fake_quant(x: jax.Array, qparams: QParams) -> jax.Array:
    """Rounds real values to representable ones, differentiably.

    Args:
      x: float[...] in real units.
      qparams: scalar, or of the rank of `x`.

    Returns:
      float of `x`'s shape and dtype.
    """
    return (qparams.scale * float_codes(x, qparams)).astype(x.dtype)


def sqnr_db(reference: jax.Array, approximation: jax.Array) -> jax.Array:
    """Measures signal to quantization noise, 10 log10 of Σ x² / Σ (x − x_hat)².

    Args:
      reference: float[...], the values before quantization.
      approximation: float[...], the values after it.

    Returns:
      float32 scalar in decibels; infinite where the two are equal.
    """
    signal = jnp.sum(jnp.square(reference))
    noise = jnp.sum(jnp.square(reference - approximation))
    return jnp.where(noise == 0, jnp.inf, 10 * jnp.log10(signal / noise))
