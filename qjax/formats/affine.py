"""Affine quantization of plain arrays: real = scale * (code - zero_point)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.base import NumberFormat, Spec
from qjax.pytree import pytree

Limits = tuple[Any, Any]  # the smallest and the largest code, int32 scalars


@pytree
@dataclasses.dataclass(frozen=True)
class QParams:
    """The affine map between codes and real values: a `Format`.

    The limits of the codes are arrays, so that formats of all widths that are stored alike share
    compiled programs.

    Attributes:
      scale: float32, real units per code, positive; of the rank of the data, 1 on shared axes.
      zero_point: int32, the code of real 0; same shape as `scale`.
      qmin: smallest code, inclusive, an int32 scalar.
      qmax: largest code, inclusive, an int32 scalar.
      dtype: the type that codes are stored in (static); by default the narrowest of int8, uint8,
        int16, uint16 that holds them all.

    Examples:
      >>> import jax.numpy as jnp
      >>> qparams = QParams(jnp.float32(0.5), jnp.int32(3), 0, 15)
      >>> qparams.bits, str(qparams.dtype)
      (4, 'uint8')
      >>> print(qparams.encode(jnp.array([-1.0, 0.2, 9.0])))
      [ 1  3 15]
    """

    scale: jax.Array
    zero_point: jax.Array
    qmin: Any
    qmax: Any
    dtype: Any = dataclasses.field(default=None, metadata={"static": True})

    name: ClassVar[str] = "uniform"
    is_uniform: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dtype is None:
            limits = {"qmin": np.int32(self.qmin), "qmax": np.int32(self.qmax)}
            for field, limit in limits.items():
                object.__setattr__(self, field, limit)
            object.__setattr__(self, "dtype", storage_type(self.bits, self.qmin < 0))

    @property
    def bits(self) -> int:
        """The width of a code; not under `jax.jit`, where the limits are traced."""
        return (int(self.qmax) - int(self.qmin)).bit_length()

    @property
    def is_signed(self) -> bool:
        """Whether codes are stored with a sign."""
        return bool(jnp.issubdtype(self.dtype, jnp.signedinteger))

    @property
    def lowest(self) -> Any:
        """The smallest code."""
        return self.qmin

    @property
    def step(self) -> jax.Array:
        """The scale."""
        return self.scale

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
        codes = jnp.asarray(self.qmin), jnp.asarray(self.qmax)
        low, high = (self.scale * (code - self.zero_point).astype(jnp.float32) for code in codes)
        return low, high

    def at(self, x: jax.Array) -> "QParams":
        """The grid of codes for the values of a tensor: the same for all."""
        return self

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps real values to codes; see `quantize_array`."""
        return quantize_array(x, self)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps codes to real values; see `dequantize`."""
        return dequantize(codes, self)

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to representable ones; see `fake_quant`."""
        return fake_quant(x, self)

    def scaled(self, factor: jax.Array) -> "QParams":
        """The format whose every value is `factor` times as large."""
        return dataclasses.replace(self, scale=self.scale * factor)


def storage_type(bits: int, is_signed: Any) -> Any:
    """The narrowest of int8, uint8, int16, uint16 that holds codes of that width."""
    return np.dtype(f"{'' if is_signed else 'u'}int{8 if bits <= 8 else 16}")


def limits_of(spec: Spec) -> Limits:
    """The smallest and the largest code of a width."""
    if spec.symmetric:
        largest = 2 ** (spec.bits - 1) - 1
        return np.int32(-largest), np.int32(largest)
    return np.int32(0), np.int32(2**spec.bits - 1)


def with_zero(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least range that holds [low, high] and 0, float32."""
    return jnp.minimum(low, 0).astype(jnp.float32), jnp.maximum(high, 0).astype(jnp.float32)


def usable_scale(scale: jax.Array) -> jax.Array:
    """A scale, or 1 where it is 0 or too small to divide by."""
    return jnp.where(scale > jnp.finfo(jnp.float32).tiny, scale, jnp.ones_like(scale))


def magnitude(peak: jax.Array) -> jax.Array:
    """The power of two nearest to a positive number; 1 for 0 and for what no power is near.

    Numbers divided by that of the greatest one can be squared: nothing is rounded, and nothing
    leaves the range of float32.

    Args:
      peak: float[...], not negative.
    """
    nearest = lax.reduce_precision(peak, exponent_bits=8, mantissa_bits=0)
    tiny = jnp.finfo(nearest.dtype).tiny
    return jnp.where((nearest > tiny) & jnp.isfinite(nearest), nearest, jnp.ones_like(nearest))


def affine_qparams(
    low: jax.Array, high: jax.Array, spec: Spec, limits: Limits | None = None
) -> QParams:
    """Finds the map that covers [low, high], with real 0 exactly representable.

    Symmetric: scale = max(|low|, |high|) / qmax, zero_point = 0. Asymmetric, with low ≤ 0 ≤ high:
    scale = (high − low) / (2^b − 1), zero_point = round(−low / scale); where low = 0 the zero point
    is 0 and the format is symmetric unsigned. A range of width 0 gets scale 1.

    Args:
      low: float[...], the smallest value to represent; values above 0 count as 0.
      high: float[...], the largest value to represent; values below 0 count as 0.
      spec: the number format.
      limits: the smallest and the largest code; by default those of the spec's width.

    Returns:
      Qparams of the shape of `low` and `high`.

    References:
      Jacob et al., 2018, arXiv:1712.05877, section 2.1 and eq. 12.
    """
    qmin, qmax = (jnp.asarray(limit) for limit in limits or limits_of(spec))
    low, high = with_zero(low, high)
    width = jnp.maximum(-low, high) if spec.symmetric else high - low
    steps = qmax if spec.symmetric else qmax - qmin
    scale = usable_scale(width / steps.astype(jnp.float32))
    zero_point = jnp.zeros_like(scale) if spec.symmetric else jnp.round(-low / scale)
    zero_point = jnp.clip(zero_point, *(limit.astype(jnp.float32) for limit in (qmin, qmax)))
    return QParams(scale, zero_point.astype(jnp.int32), qmin, qmax, spec.dtype)


def with_exact_products(qparams: QParams) -> QParams:
    """Rounds scales to 16 significant bits: times a code of 8 bits they are exact in float32.

    The sum of two such values is rounded once, in whatever way a compiler fuses it, so that every
    evaluation of a residual sum is the same.
    """
    return dataclasses.replace(qparams, scale=lax.reduce_precision(qparams.scale, 8, 15))


AFFINE = NumberFormat(QParams.name, QParams, limits_of, affine_qparams, is_uniform=True)


def _check_rank(x: jax.Array, qparams: QParams) -> None:
    if qparams.scale.ndim not in (0, x.ndim):
        raise ValueError(
            f"`scale` must have the rank of the data, {x.ndim}, or be a scalar; got shape "
            f"{qparams.scale.shape}. Keep reduced axes with size 1."
        )


@jax.custom_jvp
def straight_through(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, with the gradient of `like`; NaN where that is NaN.

    References:
      Bengio et al., 2013, arXiv:1308.3432 (straight-through estimator).
    """
    return jnp.where(jnp.isnan(like), like, value)


@straight_through.defjvp
def _gradient_of_like(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


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
    low, high = relative_limits(qparams)
    clipped = jnp.clip(codes, low, high)
    return straight_through(jnp.round(clipped), clipped)


def relative_limits(qparams: QParams) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest code less the zero point, float32 of its shape."""
    zero_point = qparams.zero_point.astype(jnp.float32)
    low, high = (jnp.asarray(limit, jnp.float32) for limit in (qparams.qmin, qparams.qmax))
    return low - zero_point, high - zero_point


def quantize_array(x: jax.Array, qparams: QParams) -> jax.Array:
    """Maps real values to codes: clip(round(x / scale) + zero_point, qmin, qmax).

    Infinity becomes the outermost code. No code stands for NaN: it becomes that of 0.

    Args:
      x: float[...] in real units.
      qparams: scalar, or of the rank of `x`.

    Returns:
      Codes of `x`'s shape in the narrowest integer type that holds them.

    Raises:
      ValueError: if `scale` has neither the rank of `x` nor rank 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> qparams = QParams(jnp.float32(0.5), jnp.int32(0), -7, 7)
      >>> print(quantize_array(jnp.array([0.6, -2.0, 99.0]), qparams))
      [ 1 -4  7]

    References:
      Jacob et al., 2018, arXiv:1712.05877, eq. 1.
    """
    floats = float_codes(x, qparams)
    codes = jnp.where(jnp.isnan(floats), 0.0, floats).astype(jnp.int32) + qparams.zero_point
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

    Examples:
      >>> import jax.numpy as jnp
      >>> qparams = QParams(jnp.float32(0.5), jnp.int32(0), -7, 7)
      >>> print(dequantize(jnp.array([1, -4, 7]), qparams))
      [ 0.5 -2.   3.5]

    References:
      Jacob et al., 2018, arXiv:1712.05877, eq. 1.
    """
    _check_rank(codes, qparams)
    return qparams.scale * (codes.astype(jnp.int32) - qparams.zero_point).astype(jnp.float32)


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` as another type of floats, rounded in every program.

    A compiler may leave out a rounding to bfloat16 where the next operation is in float32 again,
    and two programs are then not the same.
    """
    if dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def fake_quant(x: jax.Array, qparams: QParams) -> jax.Array:
    """Rounds real values to representable ones, differentiably.

    Args:
      x: float[...] in real units.
      qparams: scalar, or of the rank of `x`.

    Returns:
      float of `x`'s shape and dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> qparams = QParams(jnp.float32(0.5), jnp.int32(0), -7, 7)
      >>> print(fake_quant(jnp.array([0.6, -2.0, 99.0]), qparams))
      [ 0.5 -2.   3.5]
    """
    return cast(qparams.scale * float_codes(x, qparams), x.dtype)


def sqnr_db(reference: jax.Array, approximation: jax.Array) -> jax.Array:
    """Measures signal to quantization noise, 10 log10 of Σ x² / Σ (x − x_hat)².

    Args:
      reference: float[...], the values before quantization.
      approximation: float[...], the values after it.

    Returns:
      float32 scalar in decibels; infinite where the two are equal.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(f"{sqnr_db(jnp.array([3.0, 4.0]), jnp.array([3.0, 3.5])):.2f} dB")
      20.00 dB
    """
    unit = magnitude(jnp.max(jnp.abs(reference), initial=0))
    signal = jnp.sum(jnp.square(reference / unit))
    noise = jnp.sum(jnp.square((reference - approximation) / unit))
    return jnp.where(noise == 0, jnp.inf, 10 * jnp.log10(signal / noise))
