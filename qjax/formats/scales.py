"""Which scales a format may have: any number, or powers of two (fixed point).

A fixed-point number is an integer times 2^-n and has no zero point. Multiplying by such a scale is
a shift, and so is going from one of them to another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.affine import (
    Limits,
    QParams,
    affine_qparams,
    limits_of,
    usable_scale,
    with_zero,
)
from qjax.formats.base import Spec

_EXPONENT_STEP = 2**23  # of the bits of a float32 from one exponent to the next


class Scales(NamedTuple):
    """Which scales a format may have.

    Attributes:
      name: what a recipe calls them.
      cover: of (low, high, spec, limits): the affine format with such a scale that covers a range;
        None for the one that the family of formats finds.
      nearest_ratio: of positive numbers: the nearest ratio of two such scales.
      shares: what shares of the extremes a search tries, one for every scale that differs; None for
        a grid.
    """

    name: str
    cover: Callable[..., Any] | None
    nearest_ratio: Callable[[jax.Array], jax.Array]
    shares: tuple[float, ...] | None


def power_of_two_below(x: jax.Array) -> jax.Array:
    """The greatest power of two that is no greater: 2^⌊log2 x⌋, exactly.

    Args:
      x: float32[...], positive and normal.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(bits & -_EXPONENT_STEP, jnp.float32)


def power_of_two_above(x: jax.Array) -> jax.Array:
    """The least power of two that is no smaller: 2^⌈log2 x⌉, exactly.

    Args:
      x: float32[...], positive and normal.
    """
    below = power_of_two_below(x)
    return jnp.where(below < x, 2 * below, below)


def nearest_power_of_two(x: jax.Array) -> jax.Array:
    """The power of two of least distance; halfway the greater one.

    With the codes q fixed, ‖x·q − w‖² is a parabola in x, so that of all powers of two this one has
    the least error where `x` has the least of all.

    Args:
      x: float32[...], positive and normal.
    """
    below = power_of_two_below(x)
    return jnp.where(x < 1.5 * below, below, 2 * below)


def fixed_point_qparams(
    low: jax.Array, high: jax.Array, spec: Spec, limits: Limits | None = None
) -> QParams:
    """Finds the finest fixed-point format that covers [low, high].

    Symmetric codes, and those of a range that starts at 0, have zero_point 0. Where a range has
    values below 0, codes 0 … 2^b − 1 have zero_point 2^(b−1): they are the signed numbers
    −2^(b−1) … 2^(b−1) − 1 of two's complement, stored with an offset.

    Args:
      low: float[...], the smallest value to represent; values above 0 count as 0.
      high: float[...], the largest value to represent; values below 0 count as 0.
      spec: the number format.
      limits: the smallest and the largest code; by default those of the spec's width.

    Returns:
      Qparams of the shape of `low` and `high`, every scale a power of two; 1 for a range of width
      0.

    Examples:
      >>> from qjax.formats.spec import QuantSpec
      >>> spec = QuantSpec(8, symmetric=False)
      >>> for ends in ((0.0, 5.0), (-0.5, 5.0)):
      ...     qparams = fixed_point_qparams(*map(jnp.float32, ends), spec)
      ...     print(1 / float(qparams.scale), int(qparams.zero_point))
      32.0 0
      16.0 128
    """
    if spec.symmetric:
        free = affine_qparams(low, high, spec, limits)
        return dataclasses.replace(free, scale=power_of_two_above(free.scale))
    qmin, qmax = (jnp.asarray(limit) for limit in limits or limits_of(spec))
    low, high = with_zero(low, high)
    zero_point = jnp.where(low < 0, (qmax + 1) // 2, 0)
    below, above = (codes.astype(jnp.float32) for codes in (zero_point, qmax - zero_point))
    needed = usable_scale(jnp.maximum(-low / jnp.maximum(below, 1), high / above))
    return QParams(power_of_two_above(needed), zero_point, qmin, qmax, spec.dtype)


FREE = Scales("free", None, lambda ratio: ratio, None)
POWER_OF_TWO = Scales(
    "power_of_two",
    fixed_point_qparams,
    nearest_power_of_two,
    tuple(2.0**-k for k in range(8)),
)
SCALES: dict[str, Scales] = {scales.name: scales for scales in (FREE, POWER_OF_TWO)}
