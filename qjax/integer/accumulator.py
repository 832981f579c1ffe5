"""Accumulators of fewer than 32 bits: what a sum becomes that does not fit.

An accumulator of p bits holds −2^(p−1) … 2^(p−1) − 1. It starts at the bias and adds one product
after the other, in the order of the patch: window, then input channel. Beyond its range it wraps
around or saturates, checked after every term or once after the whole sum (a wide adder in front of
a narrow register). Wrapping gives the same number either way.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.spec import check_choice

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


class OverflowRule(NamedTuple):
    """What becomes of a sum that does not fit.

    Attributes:
      name: in `OVERFLOWS`.
      fit: of (int32[...], bits): the same sums as an accumulator of that width holds them.
      is_modular: whether a sum checked after every term is the same as one checked at its end.
    """

    name: Overflow
    fit: Callable[[jax.Array, int], jax.Array]
    is_modular: bool


class CheckRule(NamedTuple):
    """When a sum is brought to the width of its accumulator.

    Attributes:
      name: in `CHECKS`.
      every_term: whether after every term; otherwise once, after the whole sum.
    """

    name: Check
    every_term: bool


def _wrap(acc: jax.Array, bits: int) -> jax.Array:
    unused = 32 - bits
    return (acc << unused) >> unused


def _saturate(acc: jax.Array, bits: int) -> jax.Array:
    highest = 2 ** (bits - 1) - 1
    return jnp.clip(acc, -highest - 1, highest)


OVERFLOWS: dict[str, OverflowRule] = {
    rule.name: rule
    for rule in (
        OverflowRule("wrap", _wrap, is_modular=True),
        OverflowRule("saturate", _saturate, is_modular=False),
    )
}
CHECKS: dict[str, CheckRule] = {
    rule.name: rule
    for rule in (CheckRule("sum", every_term=False), CheckRule("term", every_term=True))
}


def check_accumulator(argument: str, accumulator: Accumulator) -> None:
    """Refuses an accumulator that cannot be simulated.

    Args:
      argument: what it was given as.
      accumulator: to look at.

    Raises:
      ValueError: its width is not 2 to 32, or it names no overflow or check.
    """
    if not MIN_BITS <= accumulator.bits <= MAX_BITS:
        raise ValueError(
            f"`{argument}` must have {MIN_BITS} to {MAX_BITS} bits; got {accumulator.bits}."
        )
    check_choice(f"{argument}.overflow", accumulator.overflow, OVERFLOWS)
    check_choice(f"{argument}.check", accumulator.check, CHECKS)


def fit(acc: jax.Array, accumulator: Accumulator) -> jax.Array:
    """Brings sums into the range of an accumulator.

    Args:
      acc: int32[...].
      accumulator: which one.

    Returns:
      int32[...].
    """
    return OVERFLOWS[accumulator.overflow].fit(acc, accumulator.bits)


def is_sum_enough(accumulator: Accumulator) -> bool:
    """Whether fitting the whole sum gives what the accumulator holds, however it checks."""
    return OVERFLOWS[accumulator.overflow].is_modular or not CHECKS[accumulator.check].every_term


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
