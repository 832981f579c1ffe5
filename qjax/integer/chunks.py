"""Chunks of a batch, one after the other: what is computed in between stays in the cache."""

import math
from collections.abc import Callable

import jax
from jax import lax

from qjax.graph.operation import Linear, shape_of_output
from qjax.integer.lowerings import Lowering

_BYTES = 2**21  # of the patches and accumulators of a chunk
_POSITIONS = 256  # of an output that make a chunk worth its loop
_ACCUMULATOR_BYTES = 4


def chunk_size(operation: Linear, lowering: Lowering, x: jax.Array) -> int | None:
    """How many examples of a batch are computed at a time: a divisor of their number.

    At most half of them, where that is enough work: XLA computes what leads to the input of a loop
    once, and what leads to slices that no loop takes once for each of them.

    Args:
      operation: the linear operation of a layer.
      lowering: of its accumulator.
      x: int[...], its input.

    Returns:
      None where the whole batch is: its lowering cuts no patches, the batch has no axis that comes
      first in input and output, or it is a symbol.
    """
    first = operation.position_axis(x.ndim), operation.output_order(x.ndim)[0]
    is_cut = lowering.method.cuts_patches and not operation.is_product
    if not is_cut or first != (0, 0) or not isinstance(x.shape[0], int):
        return None
    groups, patch, channels = operation.matrix_shape
    outputs = math.prod(shape_of_output(operation, x.shape)[1:])
    bytes_of_one = outputs // channels * patch * x.dtype.itemsize + outputs * _ACCUMULATOR_BYTES
    is_halved = outputs // channels * len(x) >= 2 * _POSITIONS
    most = min(_BYTES // max(bytes_of_one, 1), len(x) // 2 if is_halved else len(x))
    size = next((n for n in range(most, 0, -1) if len(x) % n == 0), 1)
    return None if size >= len(x) else size


def by_chunks(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, size: int | None
) -> jax.Array:
    """Applies a function of a batch to chunks of it.

    Args:
      function: of [n, ...] for any n: [n, ...].
      x: [batch, ...].
      size: the number of examples of a chunk, a divisor of the batch; None for all at once.
    """
    if size is None:
        return function(x)
    y = lax.map(function, x.reshape(-1, size, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])
