"""Moments of the patches that a layer's kernel meets."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

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


def cross_moments(operation: Linear, stride: int, residual: Callable[..., jax.Array]) -> Observer:
    """The moments that tell which change of a layer's kernel makes up for a residual best.

    Args:
      operation: the layer's linear operation.
      stride: between the positions of a batch that are counted.
      residual: (patches of a group, *parts of that group) -> what its output lacks there,
        float32[positions, channels].

    Returns:
      An observer whose batches are pairs (layer input, parts, each [groups, ...]) and whose
      statistic is a `CrossMoments`.
    """
    groups, patch, channels = operation.matrix_shape

    def of_group(patches: jax.Array, *parts: Any) -> CrossMoments:
        missing = shared(residual(patches, *parts), is_returned=False)
        chex.assert_shape(missing, (len(patches), channels))
        return CrossMoments(missing.sum(0), _product("pm,pk->mk", missing, patches).T)

    def update(
        state: tuple[jax.Array, CrossMoments], batch: tuple[jax.Array, Any]
    ) -> tuple[jax.Array, CrossMoments]:
        return _added(state, *map_groups(of_group, operation, *batch, stride))

    zeros = CrossMoments(_zeros(groups, channels), _zeros(groups, patch, channels))
    return Observer(lambda: (_zeros(), zeros), update, mean_of)


def map_groups(
    function: Callable[..., Any], operation: Linear, x: jax.Array, parts: Any, stride: int
) -> tuple[int, Any]:
    """Applies a function to the patches of every group.

    All patches of a depthwise convolution take many times the room of its input, those of one
    channel stay in the cache of a CPU: there it takes one group after the other.

    Args:
      function: (float32[positions, patch], *parts of the group) -> arrays.
      operation: the linear operation.
      x: a batch of its inputs.
      parts: further arguments, each [groups, ...].
      stride: between the positions.

    Returns:
      How many positions there are, and what the function returns, each [groups, ...].
    """
    count = jax.eval_shape(partial(operation.patches, stride=stride), x).shape[0]

    def of_group(one: Linear, x: jax.Array, parts: Any) -> Any:
        patches = one.patches(x.astype(jnp.float32), stride)[:, 0]
        return function(shared(patches, is_returned=False), *parts)

    if operation.matrix_shape[0] == 1:
        found = of_group(operation, x, jax.tree.map(lambda part: part[0], parts))
        return count, jax.tree.map(lambda each: each[None], found)
    one, inputs = operation.by_group(x)
    if jax.default_backend() != "cpu":
        return count, jax.vmap(partial(of_group, one))(inputs, parts)
    return count, lax.map(lambda given: of_group(one, *given), (inputs, parts))


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def mean_of(state: tuple[jax.Array, Any]) -> Any:
    """The statistic of an observer's state (count, sums)."""
    count, sums = state
    return jax.tree.map(lambda total: total / count, sums)


_product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _added(state: tuple[jax.Array, Any], count: int, sums: Any) -> tuple[jax.Array, Any]:
    return state[0] + count, jax.tree.map(jnp.add, state[1], sums)


@partial(jax.jit, static_argnames=("operation", "stride"))
def _add_patches(
    state: tuple[jax.Array, Moments], x: jax.Array, operation: Linear, stride: int
) -> tuple[jax.Array, Moments]:
    def of_group(patches: jax.Array) -> Moments:
        return Moments(patches.sum(0), _product("pk,pl->kl", patches, patches))

    return _added(state, *map_groups(of_group, operation, x, (), stride))
