"""Codes that are positions in a table of levels: real = level[code], or scale · level[code].

The value of a code need not be a multiple of anything, so that levels can stand where the values of
a kernel are. A sum of products of such values is a sum in float.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import straight_through, usable_scale
from qjax.formats.base import NumberFormat, Spec

C = TypeVar("C", bound="Codebook")

WIDTHS = range(2, 9)  # of a code, in bits


def nearest_level(x: jax.Array, levels: jax.Array) -> jax.Array:
    """The position of the level of least distance; halfway that of the lower one.

    Args:
      x: float[...].
      levels: float[L] for all of `x`, or float[..., L] with axes of the size of those of `x` or 1;
        ascending.

    Returns:
      int32 of the shape of `x`: how many midpoints of two neighbouring levels lie below.

    Examples:
      >>> import jax.numpy as jnp
      >>> nearest_level(jnp.array([-9.0, 0.4, 0.6, 2.5]), jnp.array([0.0, 1.0, 4.0])).tolist()
      [0, 0, 1, 1]
    """
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    between = between.reshape((1,) * (x.ndim + 1 - between.ndim) + between.shape)
    return jnp.sum(x[..., None] > between, axis=-1, dtype=jnp.int32)


def levels_at(levels: jax.Array, codes: jax.Array) -> jax.Array:
    """The levels at these positions; shapes as of `nearest_level`."""
    if levels.ndim == 1:
        return levels[codes.astype(jnp.int32)]
    found = jnp.take_along_axis(levels, codes.astype(jnp.int32)[..., None], -1, mode="clip")
    return found[..., 0]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A `Format` with one table for a whole kernel, times a scale.

    Attributes:
      scale: float32, positive; of the rank of the data, 1 on shared axes.
      levels: float32[2^b], ascending, 0 among them.
    """

    scale: jax.Array
    levels: jax.Array

    name: ClassVar[str]
    is_uniform: ClassVar[bool] = False
    lowest: ClassVar[int] = 0
    dtype: ClassVar[Any] = np.dtype(np.uint8)

    @property
    def bits(self) -> int:
        """The width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def step(self) -> jax.Array:
        """The scale."""
        return self.scale

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps real values to the positions of the nearest levels."""
        return nearest_level(x / self.scale, self.levels).astype(self.dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps positions to real values."""
        return self.scale * levels_at(self.levels, codes)

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to the nearest levels; the gradient passes straight through."""
        return straight_through(self.decode(self.encode(x)), x).astype(x.dtype)

    def scaled(self: C, factor: jax.Array) -> C:
        """The format whose every value is `factor` times as large."""
        return dataclasses.replace(self, scale=self.scale * factor)


def fixed_codebook(
    type: type[Codebook], levels_of: Callable[[Spec], np.ndarray], widths: range = WIDTHS
) -> NumberFormat:
    """The family of formats with the levels of a width, which lie in [−1, 1] and reach ±1.

    Args:
      type: a subclass of `Codebook`, with a name.
      levels_of: of a spec: float32[2^b], ascending.
      widths: the bits that there are levels for.
    """
    return NumberFormat(type.name, type, levels_of, partial(_cover, type), False, widths)


def _cover(type: type[Codebook], low: Any, high: Any, spec: Spec, levels: Any) -> Codebook:
    """The format whose outermost levels are as far out as the range."""
    del spec
    return type(usable_scale(jnp.maximum(-low, high).astype(jnp.float32)), jnp.asarray(levels))
