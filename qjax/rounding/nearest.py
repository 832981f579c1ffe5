"""Rounding every element to its nearest code: least error of the kernel, not of the output."""

from typing import Any

import jax

from qjax.formats.base import elementwise
from qjax.rounding.base import Problem, Rounding


def round_nearest(kernel: jax.Array, format: Any) -> jax.Array:
    """Rounds every element to its nearest code, half to even.

    Args:
      kernel: float[groups, patch, channels].
      format: of shape [groups or 1, patch groups, channels or 1].

    Returns:
      Codes of the kernel's shape.
    """
    return elementwise(format, kernel.shape[1]).encode(kernel)


def _round(problem: Problem) -> tuple[jax.Array, Any]:
    return round_nearest(problem.kernel, problem.format), problem.format


NEAREST = Rounding("nearest", frozenset(), _round)
