"""GPTQ: each rounding error is made up for by the elements that are still to be rounded.

It lowers the layer's mean squared output error eᵀ H e, e = ŵ − w, at the price of a larger error of
the kernel itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.base import element, elementwise
from qjax.rounding.base import MOMENTS, Problem, Rounding
from qjax.rounding.metric import damped

BLOCK = 128  # elements that are rounded for one product with the errors before


def round_gptq(kernel: jax.Array, hessian: jax.Array, format: Any) -> jax.Array:
    """Rounds the elements of a patch one after the other, each making up for the ones before.

    With H = L Lᵀ the squared error is ‖Lᵀ(w − q)‖². In the order of decreasing H_kk (which is the
    last row of Lᵀ first) q_k = round(w_k + Σ_{j before k} L_jk (w_j − q_j) / L_kk): what GPTQ does
    with the inverse of H, without that inverse. Elements are taken in blocks: what the ones before
    a block add is one matrix product.

    Args:
      kernel: float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch].
      format: a `Format` of shape [groups or 1, patch groups, channels or 1].

    Returns:
      Codes of the kernel's shape.

    References:
      Frantar et al., 2023, arXiv:2210.17323, algorithm 1; Chen et al., 2025, arXiv:2507.18553.
    """
    groups, patch, channels = kernel.shape
    size = max(d for d in range(1, min(BLOCK, patch) + 1) if patch % d == 0)
    order = jnp.argsort(jnp.diagonal(hessian, axis1=1, axis2=2))
    rows = jnp.arange(groups)[:, None]

    def ordered(leaf: jax.Array) -> jax.Array:
        """Puts the elements of the patch, on axis 1, into their order."""
        if leaf.ndim < 2 or leaf.shape[1] == 1:
            return leaf
        own = rows if leaf.shape[0] == groups else jnp.zeros_like(rows)
        return leaf.at[own, order].get(mode="promise_in_bounds")

    both = hessian.at[rows[:, :, None], order[:, :, None], order[:, None]]
    factor = jnp.linalg.cholesky(damped(both.get(mode="promise_in_bounds")))
    full = elementwise(format, patch)
    sorted_kernel, formats = ordered(kernel), jax.tree.map(ordered, full)

    def do_block(index: jax.Array, errors: jax.Array) -> jax.Array:
        start = patch - (index + 1) * size
        columns = lax.dynamic_slice_in_dim(factor, start, size, axis=2)
        earlier = jnp.matmul(jnp.matrix_transpose(columns), errors, precision="highest")
        square = lax.dynamic_slice_in_dim(columns, start, size, axis=1)
        wanted = lax.dynamic_slice_in_dim(sorted_kernel, start, size, axis=1)

        def do_element(step: jax.Array, block: jax.Array) -> jax.Array:
            k = size - 1 - step
            column = lax.dynamic_index_in_dim(square, k, axis=2, keepdims=False)
            inner = jnp.matmul(column[:, None], block, precision="highest")[:, 0]
            pivot = lax.dynamic_index_in_dim(column, k, axis=1)
            own, before = (
                lax.dynamic_index_in_dim(values, k, axis=1, keepdims=False)
                for values in (wanted, earlier)
            )
            rounded = element(formats, start + k).project(own + (before + inner) / pivot)
            return lax.dynamic_update_index_in_dim(block, own - rounded, k, axis=1)

        block = lax.fori_loop(
            0, size, do_element, jnp.zeros((groups, size, channels), kernel.dtype)
        )
        return lax.dynamic_update_slice_in_dim(errors, block, start, axis=1)

    errors = lax.fori_loop(0, patch // size, do_block, jnp.zeros_like(kernel))
    placed = jnp.zeros_like(kernel).at[rows, order]
    rounded = placed.set(sorted_kernel - errors, mode="promise_in_bounds", unique_indices=True)
    return full.encode(rounded)


def _round(problem: Problem) -> tuple[jax.Array, Any]:
    assert problem.hessian is not None
    return round_gptq(problem.kernel, problem.hessian, problem.format), problem.format


GPTQ = Rounding("gptq", frozenset({MOMENTS}), _round)
