"""Moments of the patches that a layer's kernel meets."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from qjax.fit.observers import Observer
from qjax.graph.operation import Linear
from qjax.rounding.metric import DAMPING
from qjax.sharing import shared


class Moments(NamedTuple):
    """First and second moments of a layer's input patches x.

    Attributes:
      mean: E[x], float32[groups, patch].
      hessian: E[x xᵀ], float32[groups, patch, patch]; half the Hessian of the layer's mean squared
        output error with respect to one output channel's kernel.
    """

    mean: jax.Array
    hessian: jax.Array


def moments(operation: Linear, stride: int = 1) -> Observer:
    """The moments of the patches that a layer's kernel meets.

    E‖(ŵ − w)ᵀ x‖² = (ŵ − w)ᵀ H (ŵ − w) with H = E[x xᵀ], over all examples and positions.

    Args:
      operation: the layer's linear operation.
      stride: between the positions of a batch that are counted.

    Returns:
      An observer of layer inputs whose statistic is a `Moments`.

    References:
      Frantar et al., 2023, arXiv:2210.17323 (GPTQ), section 3.
    """
    groups, patch, _ = operation.matrix_shape

    def update(state: tuple[jax.Array, Moments], x: jax.Array) -> tuple[jax.Array, Moments]:
        return _add_patches(state, x, operation, stride)

    zeros = Moments(_zeros(groups, patch), _zeros(groups, patch, patch))
    return Observer(lambda: (_zeros(), zeros), update, mean_of)


def centered(moments: Moments) -> Moments:
    """Takes the means out of the second moments: Cov[x] = E[x xᵀ] − E[x] E[x]ᵀ.

    Where means are large next to the spread, the difference is rounding errors, some ε Σ E[x_k]²,
    and has negative eigenvalues. There as much is added to its diagonal as damping lacks of that.
    """
    mean = moments.mean
    covariance = moments.hessian - mean[:, :, None] * mean[:, None, :]
    errors = 8 * jnp.finfo(jnp.float32).eps * jnp.sum(mean**2, axis=1)
    variances = jnp.diagonal(covariance, axis1=1, axis2=2)
    variance = jnp.mean(variances, axis=1)
    lacking = jnp.maximum(errors - DAMPING * jnp.maximum(variance, 0.0), 0.0)
    negative = jnp.maximum(-variances, 0.0)  # an error alone, as no variance is
    identity = jnp.eye(covariance.shape[1], dtype=covariance.dtype)[None]
    extra = lacking[:, None] + negative
    return Moments(mean, covariance + extra[:, None, :] * identity)


class CrossMoments(NamedTuple):
    """Moments of a residual r of a layer's output with its input patches x.

    Attributes:
      residual_mean: E[r], float32[groups, channels].
      cross: E[x rᵀ], float32[groups, patch, channels].
    """

    residual_mean: jax.Array
    cross: jax.Array


def cross_moments(operation: Linear) -> Observer:
    """The moments that tell which change of a layer's kernel makes up for a residual best.

    Args:
      operation: the layer's linear operation.

    Returns:
      An observer whose batches are pairs (patches of the layer's input, residual of its output
      there: float32[positions, groups, channels]) and whose statistic is a `CrossMoments`.
    """
    groups, patch, channels = operation.matrix_shape

    def update(
        state: tuple[jax.Array, CrossMoments], pair: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, CrossMoments]:
        return _add_residual(state, *pair)

    zeros = CrossMoments(_zeros(groups, channels), _zeros(groups, patch, channels))
    return Observer(lambda: (_zeros(), zeros), update, mean_of)


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def mean_of(state: tuple[jax.Array, Any]) -> Any:
    """The statistic of an observer's state (count, sums)."""
    count, sums = state
    return jax.tree.map(lambda total: total / count, sums)


_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def patches_of(operation: Linear, x: jax.Array, stride: int) -> jax.Array:
    """Every `stride`-th patch of a batch of a layer's inputs, float32[positions, groups, patch]."""
    return shared(operation.patches(x.astype(jnp.float32), stride), is_returned=False)


@partial(jax.jit, static_argnames=("operation", "stride"))
def _add_patches(
    state: tuple[jax.Array, Moments], x: jax.Array, operation: Linear, stride: int
) -> tuple[jax.Array, Moments]:
    count, sums = state
    patches = patches_of(operation, x, stride)
    chex.assert_shape(patches, (None, *sums.mean.shape))
    hessian = sums.hessian + _product("pgk,pgl->gkl", patches, patches)
    return count + patches.shape[0], Moments(sums.mean + patches.sum(0), hessian)


@jax.jit
def _add_residual(
    state: tuple[jax.Array, CrossMoments], patches: jax.Array, residual: jax.Array
) -> tuple[jax.Array, CrossMoments]:
    count, sums = state
    chex.assert_equal_shape_prefix([patches, residual], 2)
    cross = sums.cross + _product("pgm,pgk->gmk", residual, patches).transpose(0, 2, 1)
    return count + patches.shape[0], CrossMoments(sums.residual_mean + residual.sum(0), cross)
