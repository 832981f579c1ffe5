"""Accumulators of fewer than 32 bits: what a sum becomes that does not fit.

An accumulator of p bits holds −2^(p−1) … 2^(p−1) − 1. It starts at the bias and adds one product
after the other, in the order of the patch: window, then input channel. Beyond its range it wraps
around or saturates, checked after every term or once after the whole sum (a wide adder in front of
a narrow register). Wrapping gives the same number either way.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Overflow = Literal["wrap", "saturate"]
Check = Literal["sum", "term"]

MIN_BITS, MAX_BITS = 2, 32


class Accumulator(NamedTuple):
    """The accumulator of a layer.

    Attributes:
      bits: its width, 2 to 32.
      overflow: `wrap` (two's complement) or `saturate`.
      check: after the whole `sum`, or after every `term`.
    """

    bits: int
    overflow: Overflow = "saturate"
    check: Check = "sum"


def fit(acc: jax.Array, accumulator: Accumulator) -> jax.Array:
    """Brings sums into the range of an accumulator.

    Args:
      acc: int32[...].
      accumulator: which one.

    Returns:
      int32[...].
    """
    unused = 32 - accumulator.bits
    if accumulator.overflow == "wrap":
        return (acc << unused) >> unused
    highest = 2 ** (accumulator.bits - 1) - 1
    return jnp.clip(acc, -highest - 1, highest)


def sum_term_by_term(
    patches: jax.Array, kernel: jax.Array, bias: jax.Array, accumulator: Accumulator
) -> jax.Array:
    """Adds up products, checked after every one of them.

    Args:
      patches: centered input codes, int32[positions, groups, patch].
      kernel: centered codes, int32[groups, patch, channels].
      bias: int32[groups, channels].
      accumulator: which one.

    Returns:
      int32[positions, groups, channels].
    """

    def add_term(k: jax.Array, acc: jax.Array) -> jax.Array:
        return fit(acc + patches[:, :, k, None] * kernel[None, :, k], accumulator)

    shape = (len(patches), *bias.shape)
    start = jnp.broadcast_to(fit(bias, accumulator), shape)
    return lax.fori_loop(0, kernel.shape[1], add_term, start)


def signed_width(low: int, high: int) -> int:
    """The bits that a two's complement number needs to hold all of low … high."""
    return int(max(high, -low - 1, 0)).bit_length() + 1
