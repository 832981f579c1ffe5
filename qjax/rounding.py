"""Rounding a kernel to codes, once its scales are chosen.

All methods but `nearest` lower the layer's mean squared output error eᵀ H e, e = ŵ − w, at the
price of a larger error of the kernel itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from qjax.affine import QParams, dequantize, fake_quant, quantize_array
from qjax.quantized import expand_groups

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns that GPTQ rounds between two updates of all the others


def elementwise(qparams: QParams, patch: int) -> QParams:
    """Qparams of shape [groups or 1, patch or 1, channels or 1] for a kernel of that patch size."""
    return jax.tree.map(lambda leaf: expand_groups(leaf, patch), qparams)


def round_nearest(kernel: jax.Array, qparams: QParams) -> jax.Array:
    """Rounds every element to its nearest code, half to even.

    Args:
      kernel: float[groups, patch, channels].
      qparams: of shape [groups or 1, patch groups, channels or 1].

    Returns:
      Codes of the kernel's shape.
    """
    return quantize_array(kernel, elementwise(qparams, kernel.shape[1]))


def damped(hessian: jax.Array, damping: float = DAMPING) -> jax.Array:
    """Adds `damping` times the mean of the diagonal to it: float[..., k, k]."""
    diagonal = jnp.diagonal(hessian, axis1=-2, axis2=-1)
    extra = damping * jnp.mean(diagonal, axis=-1) + jnp.finfo(jnp.float32).tiny
    identity = jnp.broadcast_to(jnp.eye(hessian.shape[-1]), hessian.shape)
    return hessian + extra[..., None, None] * identity


def least_squares_shift(hessian: jax.Array, cross: jax.Array) -> jax.Array:
    """How a kernel must change to make up for what its input lacks.

    With r = z − Wᵀx̂ the output missing at the quantized input x̂, the kernel W + D that is least
    off in mean square has H D = E[x̂ rᵀ], H = E[x̂ x̂ᵀ].

    Args:
      hessian: H, float[groups, patch, patch].
      cross: E[x̂ rᵀ], float[groups, patch, channels].

    Returns:
      D, float[groups, patch, channels].
    """
    factor = jax.scipy.linalg.cho_factor(damped(hessian), lower=True)
    return jax.scipy.linalg.cho_solve(factor, cross)


def round_gptq(kernel: jax.Array, hessian: jax.Array, qparams: QParams) -> jax.Array:
    """Rounds the elements of a patch one after the other, each error made up for by the rest.

    In the order of decreasing H_kk: q_k = round(w_k), and all later w_j −= U_kj (w_k − q_k) / U_kk,
    where U is upper triangular and H⁻¹ = Uᵀ U. Columns are taken in blocks: inside a block every
    step updates the block, and the other columns follow once, when the block is done.

    Args:
      kernel: float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch].
      qparams: of shape [groups or 1, patch groups, channels or 1].

    Returns:
      Codes of the kernel's shape.

    References:
      Frantar et al., 2023, arXiv:2210.17323, algorithm 1.
    """
    full = elementwise(qparams, kernel.shape[1])
    full = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, kernel.shape), full)
    rounded = jax.vmap(_gptq_matrix)(kernel, hessian, full)
    return quantize_array(rounded, full)


def _gptq_matrix(kernel: jax.Array, hessian: jax.Array, qparams: QParams) -> jax.Array:
    """GPTQ on one group: float[patch, channels] on the grid of `qparams`."""
    patch, channels = kernel.shape
    order = jnp.argsort(-jnp.diagonal(hessian))
    size = min(BLOCK, patch)
    padding = -patch % size
    inverse_factor = _inverse_factor(damped(hessian[order][:, order]))
    columns = jnp.arange(patch + padding)
    inverse_factor = jnp.pad(inverse_factor, (0, padding))
    inverse_factor = inverse_factor + jnp.diag((columns >= patch).astype(jnp.float32))

    def padded(rows: jax.Array) -> jax.Array:
        return jnp.pad(rows[order], ((0, padding), (0, 0)), mode="edge")

    permuted = jax.tree.map(padded, qparams)

    def do_block(index: jax.Array, weights: jax.Array) -> jax.Array:
        start = index * size
        factor_rows = lax.dynamic_slice_in_dim(inverse_factor, start, size)
        factor = lax.dynamic_slice_in_dim(factor_rows, start, size, axis=1)
        grid = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), permuted)

        def do_column(
            k: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            block, errors = state
            rounded = fake_quant(block[k], jax.tree.map(lambda leaf: leaf[k], grid))
            error = (block[k] - rounded) / factor[k, k]
            return block - factor[k][:, None] * error[None], errors.at[k].set(error)

        block = lax.dynamic_slice_in_dim(weights, start, size)
        block, errors = lax.fori_loop(0, size, do_column, (block, jnp.zeros_like(block)))
        later = jnp.where(columns[None] >= start + size, factor_rows, 0.0)
        weights = weights - jnp.matmul(later.T, errors, precision="highest")
        return lax.dynamic_update_slice_in_dim(weights, block, start, axis=0)

    blocks = (patch + padding) // size
    weights = lax.fori_loop(0, blocks, do_block, padded(kernel))
    return jnp.zeros_like(kernel).at[order].set(weights[:patch])


def _inverse_factor(matrix: jax.Array) -> jax.Array:
    """The upper triangular U with matrix⁻¹ = Uᵀ U, by the Cholesky factor from the last row up."""
    upper = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(upper, jnp.eye(len(matrix)), lower=False)


@partial(jax.jit, static_argnames="sweeps")
def coordinate_sweeps(
    codes: jax.Array, kernel: jax.Array, hessian: jax.Array, qparams: QParams, sweeps: int
) -> tuple[jax.Array, QParams]:
    """Improves codes and scales in turn: each step has the least eᵀ H e with all else fixed.

    Scales: s = (qᵀ H w) / (qᵀ H q) per output channel, where a channel has one scale. Codes: with
    g = H (ŵ − w), the best value of element k is ŵ_k − g_k / H_kk, rounded to the grid.

    Args:
      codes: [groups, patch, channels].
      kernel: w, float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch].
      qparams: of shape [groups or 1, patch groups, channels or 1].
      sweeps: how many times over all elements.

    Returns:
      Codes and qparams of the same shapes.

    References:
      Zhang et al., 2024, arXiv:2403.07134 (COMQ).
    """
    metric = damped(hessian, 1e-4)
    diagonal = jnp.diagonal(metric, axis1=1, axis2=2)

    def refit(values: jax.Array, qparams: QParams) -> QParams:
        weighted = jnp.matmul(metric, values, precision="highest")
        fit = jnp.sum(weighted * kernel, 1, keepdims=True)
        energy = jnp.sum(weighted * values, 1, keepdims=True)
        factor = jnp.where((energy > 0) & (fit > 0), fit / jnp.where(energy > 0, energy, 1.0), 1.0)
        return QParams(qparams.scale * factor, qparams.zero_point, qparams.qmin, qparams.qmax)

    has_own_scale = qparams.scale.shape == (kernel.shape[0], 1, kernel.shape[2])

    def sweep(_: int, state: tuple[jax.Array, QParams]) -> tuple[jax.Array, QParams]:
        values, qparams = state
        if has_own_scale:
            refitted = refit(values, qparams)
            values = values * (refitted.scale / qparams.scale)
            qparams = refitted
        grid = elementwise(qparams, kernel.shape[1])
        grid = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, kernel.shape), grid)
        gradient = jnp.matmul(metric, values - kernel, precision="highest")

        def do_element(
            k: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            values, gradient = state
            best = values[:, k] - gradient[:, k] / diagonal[:, k, None]
            rounded = fake_quant(best, jax.tree.map(lambda leaf: leaf[:, k], grid))
            change = rounded - values[:, k]
            return values.at[:, k].set(rounded), gradient + metric[:, :, k, None] * change[:, None]

        values, _gradient = lax.fori_loop(0, kernel.shape[1], do_element, (values, gradient))
        return values, qparams

    values = dequantize(codes, elementwise(qparams, kernel.shape[1]))
    values, qparams = lax.fori_loop(0, sweeps, sweep, (values, qparams))
    return quantize_array(values, elementwise(qparams, kernel.shape[1])), qparams
