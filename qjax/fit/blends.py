"""Blends of two examples: the float network is less sure of them than of what it was trained on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHARE = 0.7  # of an example in a blend with the one before


def blended(x: Any, partners: Any, shares: Any) -> Any:
    """Blends the examples of a batch: λ·x + (1 − λ)·x[partners].

    Args:
      x: arrays with a leading axis of N examples.
      partners: int32[N].
      shares: float32[N], λ.
    """
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(x)):
        return x

    def blend(leaf: jax.Array) -> jax.Array:
        share = jnp.reshape(shares, (-1, *[1] * (leaf.ndim - 1))).astype(leaf.dtype)
        return share * leaf + (1 - share) * leaf[partners]

    return jax.tree.map(blend, x)


def blended_in_pairs(x: Any) -> Any:
    """Blends every example with the one before it: 0.7·x + 0.3·x'."""
    count = len(jax.tree.leaves(x)[0])
    partners = np.roll(np.arange(count), 1)
    return blended(x, partners, np.full(count, SHARE, np.float32))
