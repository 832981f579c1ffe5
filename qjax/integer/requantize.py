"""Requantization: integers on one grid to integers on another, in a choice of arithmetics.

A value acc on a grid of step s is acc·M on a grid of step s', M = s / s'. The arithmetics differ in
how they represent M and how they round:

| arithmetic | M | result |
|---|---|---|
| `float` | float32 | round(acc·M), half to even, in float32 |
| `fixed_point` | m·2^−n, 2^30 ≤ m < 2^31 | floor((acc·m + 2^(n−1)) / 2^n), m int32 |
| `shift` | 2^−k, k = round(−log2 M) | round(acc·2^−k), half to even, shifts only |
| `floor` | as `fixed_point` | floor(acc·m / 2^n) |
| `divide` | 1/d, d = round(1/M), where M < 1 | floor(acc/d + 1/2); acc·round(M) where M ≥ 1 |

Where all scales are powers of two (fixed point), every M is 2^−k, and `shift` rounds exactly as
fake quantization does.

All but `float` touch acc with integer operations only; M's representation is computed from the
scales, which are float32. Results beyond int32 saturate.

References:
  Jacob et al., 2018, arXiv:1712.05877, section 2.2 and appendix B (gemmlowp).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import QParams, relative_limits

_INT32_MAX = 2**31 - 1


class Arithmetic(NamedTuple):
    """A way to multiply integers by a positive real number M and to round.

    Attributes:
      name: in `ARITHMETICS`.
      requantize: of (acc, M): acc·M, rounded. acc is int32[...], above −2^31, M float32 of a shape
        that broadcasts against it, the result int32[...], saturated to ±(2^31 − 1), or in `float`
        arithmetic to ±(2^31 − 2^7).
      to_codes: of (acc, M, qparams): clip(acc·M + zero_point, qmin, qmax) in the type of the codes.
      only_integers: whether sums are integers, and nothing but integers touches them. Otherwise
        sums are float32, and `to_codes` takes accumulators in float32 too.
      only_shifts: whether M is always a power of two: then the scales of sums are, and what is
        multiplied by any other number is real.
    """

    name: str
    requantize: Callable[[jax.Array, jax.Array], jax.Array]
    to_codes: Callable[[jax.Array, jax.Array, QParams], jax.Array]
    only_integers: bool
    only_shifts: bool = False


def of_integers(
    name: str,
    requantize: Callable[[jax.Array, jax.Array], jax.Array],
    only_shifts: bool = False,
) -> Arithmetic:
    """An arithmetic of integers alone: its codes are requantized integers, clipped.

    Args:
      name: of the arithmetic.
      requantize: see `Arithmetic`.
      only_shifts: see `Arithmetic`.
    """

    def to_codes(acc: jax.Array, multiplier: jax.Array, qparams: QParams) -> jax.Array:
        low, high = (limit - qparams.zero_point for limit in (qparams.qmin, qparams.qmax))
        codes = jnp.clip(requantize(acc, multiplier), low, high) + qparams.zero_point
        return codes.astype(qparams.dtype)

    return Arithmetic(name, requantize, to_codes, only_integers=True, only_shifts=only_shifts)


def _round(acc: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Rounds acc·M half to even, in float32."""
    limit = 2.0**31 - 2.0**7  # the greatest float32 below 2^31
    product = jnp.round(acc.astype(jnp.float32) * multiplier)
    return jnp.clip(product, -limit, limit).astype(jnp.int32)


def _round_to_codes(acc: jax.Array, multiplier: jax.Array, qparams: QParams) -> jax.Array:
    """Clips acc·M to the grid and rounds half to even, in float32."""
    product = jnp.clip(acc.astype(jnp.float32) * multiplier, *relative_limits(qparams))
    # Adding 1.5·2^23 leaves no bit after the binary point: the addition rounds half to even, and
    # the integer stands in the low bits. It takes less time than rounding and converting.
    magic = 1.5 * 2**23
    rounded = lax.bitcast_convert_type(product + magic, jnp.int32) - _bits_of(magic)
    return (rounded + qparams.zero_point).astype(qparams.dtype)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _fixed_point(acc: jax.Array, multiplier: jax.Array, *, rounds: bool) -> jax.Array:
    """Computes floor((acc·m + r) / 2^n), M = m·2^−n."""
    return multiply_shift(acc, *fixed_point(multiplier), rounds=rounds)


def fixed_point(multiplier: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Represents M as m·2^−n: (m, n), int32 of M's shape, 2^30 ≤ m < 2^31 and 1 ≤ n ≤ 62.

    M has 24 significant bits, so m·2^−n is M exactly. M < 2^−32 becomes 0, which is what it rounds
    every int32 to; M ≥ 2^30 becomes the greatest representable number.
    """
    fraction, exponent = jnp.frexp(multiplier)  # M = fraction·2^exponent, 1/2 ≤ fraction < 1
    mantissa = (fraction * 2.0**24).astype(jnp.int32) * 2**7
    mantissa = jnp.where(exponent < -31, 0, jnp.where(exponent > 30, _INT32_MAX, mantissa))
    return mantissa, 31 - jnp.clip(exponent, -31, 30)


def multiply_shift(acc: jax.Array, m: jax.Array, n: jax.Array, *, rounds: bool) -> jax.Array:
    """Computes floor((acc·m + r) / 2^n) on 64 bits held as two words, r = 2^(n−1) or 0.

    The product is put together from 16-bit halves, acc = a1·2^16 + a0 and m = m1·2^16 + m0, so that
    no intermediate leaves 32 bits: acc·m = a1·m1·2^32 + (a1·m0 + a0·m1)·2^16 + a0·m0.

    Args:
      acc: int32[...], above −2^31.
      m: int32, not negative, of a shape that broadcasts against `acc`.
      n: int32, 0 to 62, of such a shape.
      rounds: whether to round half up; otherwise down.

    Returns:
      int32[...], saturated to ±(2^31 − 1).
    """
    half = 2**16 - 1
    a1, a0, m1, m0 = acc >> 16, acc & half, m >> 16, m & half
    lowest = a0.astype(jnp.uint32) * m0.astype(jnp.uint32)
    carried = a0 * m1 + (lowest >> 16).astype(jnp.int32)
    middle = a1 * m0 + (carried & half)
    high = a1 * m1 + (carried >> 16) + (middle >> 16)
    low = (middle.astype(jnp.uint32) << 16) | (lowest & half)
    if rounds:  # r = 2^(n−1) lies in the lower word, or in the upper one, or is 0
        r_low = jnp.where((n >= 1) & (n <= 32), 1 << ((n - 1) & 31), 0).astype(jnp.uint32)
        total = low + r_low
        carry = (total < low).astype(jnp.int32)
        low, high = total, high + carry + jnp.where(n > 32, 1 << ((n - 33) & 31), 0)
    high, n = jnp.broadcast_arrays(high, n)
    by = (n & 31).astype(jnp.uint32)
    whole = (high.astype(jnp.uint32) << ((32 - by) & 31)) | (low >> by)
    whole = jnp.where(by == 0, low, whole).astype(jnp.int32)
    fits = (high >> (n & 31)) == (whole >> 31)
    whole = jnp.where(fits, whole, jnp.where(high < 0, -_INT32_MAX, _INT32_MAX))
    return jnp.where(n >= 32, high >> (n & 31), whole)


def _shift(acc: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Computes acc·2^−k with k = round(−log2 M), rounded half to even, saturated."""
    k = jnp.round(-jnp.log2(multiplier)).astype(jnp.int32)
    by = jnp.clip(k - 1, 0, 31)  # of k ≥ 1
    doubled = acc >> by
    whole, half = doubled >> 1, doubled & 1
    is_tie = (half == 1) & (doubled << by == acc)
    right = whole + jnp.where(is_tie, whole & 1, half)
    up = jnp.clip(-k, 0, 30)
    most = _INT32_MAX >> up
    left = jnp.where(-k > 30, jnp.sign(acc) * most, jnp.clip(acc, -most, most)) << up
    left = jnp.where(jnp.abs(acc) > most, jnp.sign(acc) * _INT32_MAX, left)
    return jnp.where(k >= 1, right, left)


def _divide(acc: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Computes floor(acc / d + 1/2) with d = round(1 / M), or acc·round(M) where M ≥ 1."""
    limit = 2.0**30
    divisor = jnp.round(jnp.minimum(1 / multiplier, limit)).astype(jnp.int32)
    divisor = jnp.broadcast_to(jnp.maximum(divisor, 1), acc.shape)
    quotient = acc // divisor
    rest = acc - quotient * divisor  # 0 … d − 1
    quotient = quotient + (rest >= divisor - rest).astype(jnp.int32)
    factor = jnp.round(jnp.minimum(multiplier, limit)).astype(jnp.int32)
    product = multiply_shift(acc, factor, jnp.zeros_like(factor), rounds=False)
    return jnp.where(multiplier >= 1, product, quotient)


FLOAT = Arithmetic("float", _round, _round_to_codes, only_integers=False)
FIXED_POINT = of_integers("fixed_point", partial(_fixed_point, rounds=True))
SHIFT = of_integers("shift", _shift, only_shifts=True)
FLOOR = of_integers("floor", partial(_fixed_point, rounds=False))
DIVIDE = of_integers("divide", _divide)

ARITHMETICS: dict[str, Arithmetic] = {
    arithmetic.name: arithmetic for arithmetic in (FLOAT, FIXED_POINT, SHIFT, FLOOR, DIVIDE)
}
