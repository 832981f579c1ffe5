"""Requantization: integers on one grid to integers on another, in a choice of arithmetics.

A value acc on a grid of step s is acc·M on a grid of step s', M = s / s'. The arithmetics differ in
how they represent M and how they round:

| arithmetic | M | result |
|---|---|---|
| `float` | float32 | round(acc·M), half to even, in float32 |
| `fixed_point` | m·2^−n, 2^30 ≤ m < 2^31 | floor((acc·m + 2^(n−1)) / 2^n), m int32 |
| `shift` | 2^−k, k = round(−log2 M) | floor(acc·2^−k + 1/2), shifts only |
| `floor` | as `fixed_point` | floor(acc·m / 2^n) |
| `divide` | 1/d, d = round(1/M), where M < 1 | floor(acc/d + 1/2); acc·round(M) where M ≥ 1 |

All but `float` touch acc with integer operations only; M's representation is computed from the
scales, which are float32. Results beyond int32 saturate.

References:
  Jacob et al., 2018, arXiv:1712.05877, section 2.2 and appendix B (gemmlowp).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import QParams

Arithmetic = Literal["float", "fixed_point", "shift", "floor", "divide"]

_INT32_MAX = 2**31 - 1


def requantize(acc: jax.Array, multiplier: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """Multiplies integers by a positive real number and rounds.

    Args:
      acc: int32[...], above −2^31.
      multiplier: float32, M, of a shape that broadcasts against `acc`.
      arithmetic: how, see the module.

    Returns:
      int32[...], saturated to ±(2^31 − 1); in `float` arithmetic to ±(2^31 − 2^7).
    """
    match arithmetic:
        case "float":
            limit = 2.0**31 - 2.0**7  # the greatest float32 below 2^31
            product = jnp.round(acc.astype(jnp.float32) * multiplier)
            return jnp.clip(product, -limit, limit).astype(jnp.int32)
        case "fixed_point":
            return multiply_shift(acc, *fixed_point(multiplier), rounds=True)
        case "floor":
            return multiply_shift(acc, *fixed_point(multiplier), rounds=False)
        case "shift":
            return _shift(acc, jnp.round(-jnp.log2(multiplier)).astype(jnp.int32))
        case "divide":
            return _divide(acc, multiplier)


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
      n: int32, 0 to 62, likewise.
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


def _shift(acc: jax.Array, k: jax.Array) -> jax.Array:
    """Computes floor(acc·2^−k + 1/2), saturated."""
    doubled = acc >> jnp.clip(k - 1, 0, 31)
    right = (doubled >> 1) + (doubled & 1)  # of k ≥ 1
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


def to_codes(
    acc: jax.Array, multiplier: jax.Array, qparams: QParams, arithmetic: Arithmetic
) -> jax.Array:
    """Requantizes integers to codes: clip(acc·M + zero_point, qmin, qmax).

    Args:
      acc: int32[...]; or the same integers as float32, which only `float` takes.
      multiplier: float32, M, of a shape that broadcasts against `acc`.
      qparams: the grid of the result, scalars.
      arithmetic: how, see the module.

    Returns:
      Codes in the narrowest integer type that holds them.
    """
    if arithmetic != "float":
        low, high = (bound - qparams.zero_point for bound in (qparams.qmin, qparams.qmax))
        codes = jnp.clip(requantize(acc, multiplier, arithmetic), low, high) + qparams.zero_point
        return codes.astype(qparams.dtype)
    zero_point = qparams.zero_point.astype(jnp.float32)
    product = acc.astype(jnp.float32) * multiplier
    product = jnp.clip(product, qparams.qmin - zero_point, qparams.qmax - zero_point)
    # Adding 1.5·2^23 leaves no bit behind the binary point: the addition rounds half to even, and
    # the integer stands in the low bits. It takes less time than rounding and converting.
    magic = 1.5 * 2**23
    rounded = lax.bitcast_convert_type(product + magic, jnp.int32) - _bits_of(magic)
    return (rounded + qparams.zero_point).astype(qparams.dtype)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))
