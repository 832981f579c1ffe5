"""Integer codes that are not neighbours: real = scale · code, the code one of a table.

Such a kernel runs like any kernel of integers, in int32 accumulators. A code is stored as its
position in the table, of b bits, and held in memory as the integer that it is.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams, storage_type, straight_through, usable_scale
from qjax.formats.base import NumberFormat, Spec
from qjax.formats.codebook import WIDTHS, levels_at, nearest_level


@dataclasses.dataclass(frozen=True)
class Multiples(QParams):
    """A `Format` whose codes are some integers, with zero point 0.

    Attributes:
      scale: float32, real units per code; of the rank of the data.
      zero_point: int32 zeros of the same shape.
      qmin: the smallest code.
      qmax: the largest code.
      dtype: of the codes, the narrowest that holds them (static).
      levels: the codes that there are, ascending integers [2^b − 1] of type `dtype`.
    """

    levels: Any = None

    def __post_init__(self) -> None:
        if self.dtype is None:
            super().__post_init__()
            object.__setattr__(self, "dtype", np.dtype(self.levels.dtype))

    @property
    def bits(self) -> int:
        """The width of a position."""
        return (len(self.levels) - 1).bit_length()

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps real values to the nearest codes."""
        return self.at_positions(nearest_level(x * self.inverse_scale, self._float_levels))

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to representable ones; the gradient passes straight through."""
        return straight_through(self.decode(self.encode(x)), x).astype(x.dtype)

    def positions(self, codes: jax.Array) -> jax.Array:
        """Maps codes to their positions in the table, int32."""
        return nearest_level(codes.astype(jnp.float32), self._float_levels)

    def at_positions(self, positions: jax.Array) -> jax.Array:
        """Maps positions in the table to codes."""
        return levels_at(jnp.asarray(self.levels), positions)

    @property
    def _float_levels(self) -> jax.Array:
        return jnp.asarray(self.levels).astype(jnp.float32)


def multiples(type: type[Multiples], magnitudes_of: Callable[[int], Any]) -> NumberFormat:
    """The family of formats with the codes 0 and ± some magnitudes.

    Args:
      type: a subclass of `Multiples`, with a name.
      magnitudes_of: of a width b: 2^(b−1) − 1 positive integers.
    """

    def limits_of(spec: Spec) -> tuple[Any, ...]:
        positive = np.sort(np.asarray(magnitudes_of(spec.bits)))
        dtype = storage_type(int(positive[-1]).bit_length() + 1, is_signed=True)
        levels = np.concatenate([-positive[::-1], [0], positive]).astype(dtype)
        return np.int32(levels[0]), np.int32(levels[-1]), levels

    return NumberFormat(type.name, type, limits_of, partial(_cover, type), True, WIDTHS)


def _cover(type: type[Multiples], low: Any, high: Any, spec: Spec, limits: Any) -> Multiples:
    """The format whose greatest code is as far out as the range."""
    del spec
    qmin, qmax, levels = map(jnp.asarray, limits)
    greatest = jnp.maximum(-low, high).astype(jnp.float32)
    scale = usable_scale(greatest / qmax.astype(jnp.float32))
    return type(scale, jnp.zeros_like(scale, jnp.int32), qmin, qmax, levels.dtype, levels)
