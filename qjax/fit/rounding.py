"""Rounding a kernel to codes, once its scales are chosen.

All methods but `nearest` lower the layer's mean squared output error eᵀ H e, e = ŵ − w, at the
price of a larger error of the kernel itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.affine import QParams, dequantize, fake_quant, quantize_array
from qjax.run.layer import expand_groups

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # elements that GPTQ rounds for one product with the errors before


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
    """Rounds the elements of a patch one after the other, each making up for the ones before.

    With H = L Lᵀ the squared error is ‖Lᵀ(w − q)‖². In the order of decreasing H_kk (which is the
    last row of Lᵀ first) q_k = round(w_k + Σ_{j before k} L_jk (w_j − q_j) / L_kk): what GPTQ does
    with the inverse of H, without that inverse. Elements are taken in blocks: what the ones before
    a block add is one matrix product.

    Args:
      kernel: float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch].
      qparams: of shape [groups or 1, patch groups, channels or 1].

    Returns:
      Codes of the kernel's shape.

    References:
      Frantar et al., 2023, arXiv:2210.17323, algorithm 1; Chen et al., 2025, arXiv:2507.18553.
    """
    full = elementwise(qparams, kernel.shape[1])
    full = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, kernel.shape), full)
    rounded = jax.vmap(_gptq_matrix)(kernel, hessian, full)
    return quantize_array(rounded, full)


def _gptq_matrix(kernel: jax.Array, hessian: jax.Array, qparams: QParams) -> jax.Array:
    """GPTQ on one group: float[patch, channels] on the grid of `qparams`."""
    patch, channels = kernel.shape
    size = max(d for d in range(1, min(BLOCK, patch) + 1) if patch % d == 0)
    order = jnp.argsort(jnp.diagonal(hessian))
    factor = jnp.linalg.cholesky(damped(hessian[order[:, None], order[None]]))
    kernel, grid = (jax.tree.map(lambda leaf: leaf[order], tree) for tree in (kernel, qparams))

    def do_block(index: jax.Array, errors: jax.Array) -> jax.Array:
        start = patch - (index + 1) * size
        columns = lax.dynamic_slice_in_dim(factor, start, size, axis=1)
        earlier = jnp.matmul(columns.T, errors, precision="highest")
        square = lax.dynamic_slice_in_dim(columns, start, size)
        wanted, levels = (
            jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), tree)
            for tree in (kernel, grid)
        )

        def do_element(step: jax.Array, block: jax.Array) -> jax.Array:
            k = size - 1 - step
            shift = (earlier[k] + jnp.matmul(square[:, k], block, precision="highest")) / square[
                k, k
            ]
            rounded = fake_quant(wanted[k] + shift, jax.tree.map(lambda leaf: leaf[k], levels))
            return block.at[k].set(wanted[k] - rounded)

        block = lax.fori_loop(0, size, do_element, jnp.zeros((size, channels)))
        return lax.dynamic_update_slice_in_dim(errors, block, start, axis=0)

    errors = lax.fori_loop(0, patch // size, do_block, jnp.zeros_like(kernel))
    return jnp.zeros_like(kernel).at[order].set(kernel - errors)


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
