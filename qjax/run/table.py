"""One quantized table: codes that the input picks from, see `qjax.graph.tables`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.base import elementwise
from qjax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class QuantizedTable:
    """The codes of a table.

    Attributes:
      codes: [rows, elements, channels].
      weights: their `Format`, [rows or 1, groups, channels or 1].
    """

    codes: jax.Array
    weights: Any

    def values(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """What the codes stand for, in the shape and the type of the float table."""
        found = elementwise(self.weights, self.codes.shape[1]).decode(self.codes)
        return found.astype(jnp.float32).reshape(shape).astype(dtype)
