"""Layers whose inputs are signs: y = K · α · Σ sign(x − t) · sign(w) + b.

K is the mean of |x − t| over the patch, α the scale of the output channel. The sum is an integer,
taken as a product of signs in float, or of bits: with n elements of which d have unlike signs it is
n − 2d, and d is the population count of an exclusive or.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.binary import Signs, signs
from qjax.graph.operation import Linear, from_output_matrix

# Of (operation, kernel, x − t): the sum of the products of their signs.
SumOfSigns = Callable[[Linear, jax.Array, jax.Array], jax.Array]

WORD = 32  # bits that are compared at once


def center(operation: Linear, inputs: Signs, x: jax.Array) -> tuple[Linear, jax.Array]:
    """Pads an input with 0 and takes its shift away: (what is left to do, x − t)."""
    left, padded = operation.padded(x.astype(jnp.float32), jnp.zeros((), jnp.float32))
    return left, padded - inputs.shift


def magnitudes(operation: Linear, centered: jax.Array) -> jax.Array:
    """K: the mean of |x − t| over every patch, of the output's shape or 1 on its channels.

    Args:
      operation: as `center` leaves it.
      centered: x − t.
    """
    single = operation.per_group
    groups, patch, _ = single.matrix_shape
    # Products with ones are exact: sums of them are the same whether or not they are fused.
    kernel = single.from_matrix(jnp.ones((groups, patch, 1), jnp.float32))
    means = single.evaluate(jnp.abs(centered), kernel) * jnp.float32(1 / patch)
    for axis, size in zip(operation.channel_axes, operation.channel_sizes, strict=True):
        if means.shape[axis] not in (1, size):
            means = jnp.repeat(means, size // means.shape[axis], axis)
    return means


def sum_of_signs(operation: Linear, kernel: jax.Array, centered: jax.Array) -> jax.Array:
    """Σ sign(x − t) · sign(w), in float32, which holds it exactly below 2^24.

    Args:
      operation: as `center` leaves it.
      kernel: ±1, [groups, patch, channels].
      centered: x − t.
    """
    matrix = operation.from_matrix(kernel.astype(jnp.float32))
    return operation.evaluate(signs(centered), matrix)


def pack_signs(x: jax.Array) -> jax.Array:
    """Packs signs along the last axis: float[..., n] to uint32[..., ceil(n / 32)].

    Bit i of word j is set where element 32·j + i is at least 0; missing elements count as set.

    Examples:
      >>> pack_signs(jnp.array([1.0, -1.0, 1.0])).tolist()
      [4294967293]
    """
    missing = -x.shape[-1] % WORD
    bits = jnp.pad(x >= 0, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=True)
    words = bits.reshape(*x.shape[:-1], -1, WORD).astype(jnp.uint32)
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(*[1] * x.ndim, WORD)
    return jnp.sum(words << places, axis=-1, dtype=jnp.uint32)


def count_signs(operation: Linear, kernel: jax.Array, centered: jax.Array) -> jax.Array:
    """What `sum_of_signs` computes, by exclusive or and population count on packed words.

    Args:
      operation: as `center` leaves it.
      kernel: ±1, [groups, patch, channels].
      centered: x − t.

    Returns:
      int32[...].

    References:
      Rastegari et al., 2016, arXiv:1603.05279, section 3.2.
    """
    patch = kernel.shape[1]
    shape = jax.eval_shape(
        lambda x: operation.apply(x, operation.from_matrix(kernel.astype(x.dtype))), centered
    ).shape
    x = pack_signs(operation.patches(centered))[:, :, None]
    w = pack_signs(kernel.swapaxes(1, 2))[None]
    unlike = jnp.sum(lax.population_count(x ^ w).astype(jnp.int32), axis=-1)
    return from_output_matrix(operation, patch - 2 * unlike, shape)
