"""A linear operation on integers as products of matrices."""

import jax
import jax.numpy as jnp
from jax import lax

from qjax.graph.operation import Linear, from_positions


def multiply(operation: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The operation as one product of matrices per group.

    Args:
      operation: without padding.
      x: its input.
      kernel: [groups, patch, channels].

    Returns:
      int32[...], its output.
    """
    patches = operation.unfold(x)
    groups, patch, _ = kernel.shape
    last = patches.ndim - 1
    if groups == 1:
        factors = patches.reshape(*patches.shape[:-2], patch), kernel[0]
        dimensions = ((last - 1,), (0,)), ((), ())
    else:
        factors = patches, kernel
        dimensions = ((last,), (1,)), ((last - 1,), (0,))
    # Operands of two types stay as they are where the algorithm is given.
    acc = lax.dot_general(
        *factors,
        dimensions,
        precision=lax.DotAlgorithmPreset.DEFAULT,
        preferred_element_type=jnp.int32,
    )
    if patches.dtype != kernel.dtype and not operation.ends_with_channels:
        # XLA rewrites a transposed product to that of transposed operands, which it cannot compute
        # where the first is signed and the second is not.
        acc = lax.optimization_barrier(acc)
    acc = jnp.expand_dims(acc, -2) if groups == 1 else jnp.moveaxis(acc, 0, -2)
    return from_positions(operation, acc)
