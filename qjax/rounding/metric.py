"""The metric in which kernels are rounded, H = E[x xᵀ], made safe to factor."""

import jax
import jax.numpy as jnp

DAMPING = 0.01  # of the mean of H's diagonal, added to it


def damped(hessian: jax.Array, damping: float | jax.Array = DAMPING) -> jax.Array:
    """Adds `damping` times the mean of the diagonal to it: float[..., k, k]."""
    diagonal = jnp.diagonal(hessian, axis1=-2, axis2=-1)
    extra = damping * jnp.mean(diagonal, axis=-1) + jnp.finfo(jnp.float32).tiny
    identity = jnp.broadcast_to(jnp.eye(hessian.shape[-1], dtype=hessian.dtype), hessian.shape)
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
