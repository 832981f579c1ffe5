"""Fixed-point numbers and their Q-formats: real = code · 2^-n.

Qm.n has a sign bit, m integer bits and n fraction bits: 1 + m + n in all, and its numbers are
−2^m … 2^m − 2^-n. UQm.n has no sign: m + n bits, 0 … 2^m − 2^-n. This is the notation of Texas
Instruments, where Q3.4 are 8 bits; that of ARM counts the sign among the integer bits and calls the
same numbers Q4.4. Either of m and n may be negative: Q-2.9 holds −0.25 … 0.25 − 2^-9 in 8 bits.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.formats.affine import QParams, dequantize, quantize_array
from qjax.formats.spec import check_bits
from qjax.pytree import pytree


class QFormat(NamedTuple):
    """Where the bits of a fixed-point number stand; `str()` writes Q3.4 or UQ4.4.

    Attributes:
      integer_bits: m, before the binary point, the sign not counted.
      fraction_bits: n, after it.
      is_signed: whether there is a sign bit.
    """

    integer_bits: int
    fraction_bits: int
    is_signed: bool = True

    def __str__(self) -> str:
        return f"{'Q' if self.is_signed else 'UQ'}{self.integer_bits}.{self.fraction_bits}"

    @property
    def bits(self) -> int:
        """The width of a code."""
        return self.is_signed + self.integer_bits + self.fraction_bits

    @property
    def qparams(self) -> QParams:
        """The numbers as an affine format, scale 2^-n and zero_point 0."""
        low = -(2 ** (self.bits - 1)) if self.is_signed else 0
        scale = jnp.float32(math.ldexp(1.0, -self.fraction_bits))
        return QParams(scale, jnp.int32(0), low, low + 2**self.bits - 1)


@pytree
@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """An array of fixed-point numbers.

    Attributes:
      codes: integers in the narrowest type that holds them.
      format: their Q-format (static).
    """

    codes: jax.Array
    format: QFormat = dataclasses.field(metadata={"static": True})

    def __str__(self) -> str:
        return f"{self.format} {self.codes}"

    def to_float(self) -> jax.Array:
        """The values, codes · 2^-n, as float32 of the shape of the codes."""
        return dequantize(self.codes, self.format.qparams)


def to_fixed_point(
    x: Any, bits: int = 8, integer_bits: int | None = None, *, is_signed: bool = True
) -> FixedPoint:
    """Rounds an array to fixed-point numbers: codes = clip(round(x · 2^n)), half to even.

    Args:
      x: float[...].
      bits: width of a code, sign included, 2 to 16.
      integer_bits: m of Qm.n or UQm.n; by default the least with which nothing is clipped, so that
        n = bits − m (less 1 for the sign) is the greatest. 0 for an array of zeros.
      is_signed: whether there are negative numbers; without them, values below 0 become 0.

    Returns:
      A `FixedPoint`; `to_float()` is the way back.

    Raises:
      ValueError: a width outside 2 to 16; values that are not finite; under `jax.jit` no
        `integer_bits`, as the format must not depend on values there.

    Examples:
      >>> import jax.numpy as jnp
      >>> pi = to_fixed_point(jnp.array([3.14159, -1.0, 0.3]))
      >>> print(pi, pi.to_float())
      Q2.5 [101 -32  10] [ 3.15625 -1.       0.3125 ]
      >>> print(to_fixed_point(jnp.array([3.14159, -9.0, 0.3]), integer_bits=3))
      Q3.4 [  50 -128    5]
      >>> print(to_fixed_point(jnp.array([0.0, 3.14159]), is_signed=False))
      UQ2.6 [  0 201]

    References:
      Texas Instruments, TMS320C64x DSP library, SPRU565, appendix A.2 (the notation).
    """
    check_bits("bits", bits)
    x = jnp.asarray(x, jnp.float32)
    if integer_bits is None:
        integer_bits = _least_integer_bits(x, bits, is_signed)
    format = QFormat(integer_bits, bits - is_signed - integer_bits, is_signed)
    return FixedPoint(quantize_array(x, format.qparams), format)


def _least_integer_bits(x: jax.Array, bits: int, is_signed: bool) -> int:
    """The least m with which no value of `x` is clipped."""
    if isinstance(x, Tracer):
        raise ValueError(
            "`integer_bits` must be given where `x` is traced, as under jax.jit: a format cannot "
            "depend on values there."
        )
    values = np.asarray(x, np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError("`x` must be finite; found NaN or infinity. Check how it was made.")
    largest = np.abs(values if is_signed else np.maximum(values, 0)).max(initial=0)
    if not largest:
        return 0
    for m in itertools.count(math.frexp(largest)[1] - 1):
        format = QFormat(m, bits - is_signed - m, is_signed)
        codes = np.rint(np.ldexp([values.min(), values.max()], format.fraction_bits))
        limits = format.qparams
        if (codes[0] >= limits.qmin or not is_signed) and codes[1] <= limits.qmax:
            return m
    raise AssertionError("every finite number has a format")


def q_formats(qparams: QParams) -> tuple[QFormat, ...]:
    """The Q-formats of the scales of a tensor, each once, the finest first.

    Args:
      qparams: not traced. Codes with an offset of half their range are signed, see
        `qjax.formats.scales.fixed_point_qparams`.

    Returns:
      Nothing where the tensor is not in fixed point: a scale is no power of two, or a zero point is
      that of no Q-format.

    Examples:
      >>> import jax.numpy as jnp
      >>> qparams = QParams(jnp.array([0.5, 0.125]), jnp.array([128, 0]), 0, 255)
      >>> print(*q_formats(qparams))
      UQ5.3 Q6.1
    """
    scale, zero_point = np.broadcast_arrays(*map(np.ravel, (qparams.scale, qparams.zero_point)))
    fractions, exponents = np.frexp(scale)
    offset = 0 if qparams.is_signed else 2 ** (qparams.bits - 1)
    if not np.all((fractions == 0.5) & np.isin(zero_point, (0, offset))):
        return ()
    fraction_bits, signs = (1 - exponents).tolist(), (zero_point == offset).tolist()
    found = sorted(set(zip(fraction_bits, signs, strict=True)), reverse=True)
    return tuple(QFormat(qparams.bits - sign - n, n, sign) for n, sign in found)
