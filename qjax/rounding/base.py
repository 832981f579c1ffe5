"""What a rounding is: from a kernel and a format that covers it to codes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

MOMENTS = "moments"  # a need: the second moments of the layer's input patches


class Problem(NamedTuple):
    """A kernel to round.

    Attributes:
      kernel: float32[groups, patch, channels].
      format: its `Format`, leaves of shape [groups or 1, patch groups, channels or 1, ...].
      hessian: E[x xᵀ], float32[groups, patch, patch]; None unless the rounding needs `MOMENTS`.
    """

    kernel: jax.Array
    format: Any
    hessian: jax.Array | None


class Rounding(NamedTuple):
    """A way to round kernels.

    Attributes:
      name: what a recipe calls it.
      needs: what the problem must have, a set of `MOMENTS`.
      round: of a `Problem`: codes of the kernel's shape, and the format that they are in.
    """

    name: str
    needs: frozenset[str]
    round: Callable[[Problem], tuple[jax.Array, Any]]
