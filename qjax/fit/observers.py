"""Calibration statistics, accumulated over batches in constant memory.

An observer is a triple of pure functions over an immutable state. All but `moving_average` give the
same result however the same values are split into batches, up to the rounding of sums.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.graph.operation import Linear, output_matrix


class Observer(NamedTuple):
    """A streaming statistic.

    Attributes:
      init: () -> state.
      update: (state, batch) -> state; a batch is float[...] where nothing else is said.
      final: state -> statistic.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Any], Any]
    final: Callable[[Any], Any]


def observe(observer: Observer, batches: Iterable[Any]) -> Any:
    """Runs an observer over batches and returns its statistic."""
    state = observer.init()
    for batch in batches:
        state = observer.update(state, batch)
    return observer.final(state)


def min_max() -> Observer:
    """The extremes: (min, max), float32 scalars."""

    def update(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        low, high = state
        x = x.astype(jnp.float32)
        return jnp.minimum(low, x.min()), jnp.maximum(high, x.max())

    def init() -> tuple[jax.Array, jax.Array]:
        return jnp.float32(jnp.inf), jnp.float32(-jnp.inf)

    return Observer(init, jax.jit(update), lambda state: state)


def absmax() -> Observer:
    """The largest magnitude, a float32 scalar."""
    extremes = min_max()
    return extremes._replace(final=lambda state: jnp.maximum(-state[0], state[1]))


def moving_average(decay: float = 0.9) -> Observer:
    """Exponential moving average of each batch's extremes: (low, high), float32 scalars.

    low ← decay · low + (1 − decay) · min(batch), started at the first batch's. The result depends
    on how the values are batched and ordered.

    Args:
      decay: weight of the past, from 0 to below 1.

    References:
      Jacob et al., 2018, arXiv:1712.05877, section 3.1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be from 0 to below 1; got {decay}.")

    def init() -> tuple[jax.Array, jax.Array]:
        return jnp.full(2, jnp.nan), jnp.array(False)

    def update(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        average, is_started = state
        extremes = jnp.stack([x.min(), x.max()]).astype(jnp.float32)
        blended = decay * average + (1 - decay) * extremes
        return jnp.where(is_started, blended, extremes), jnp.array(True)

    return Observer(init, jax.jit(update), lambda state: tuple(state[0]))


def histogram(low: float | jax.Array, high: float | jax.Array, bins: int = 2048) -> Observer:
    """Counts of values in equal bins over [low, high]; values outside count in the end bins.

    The statistic is (counts float32[bins], edges float32[bins + 1]).

    Args:
      low: lower edge of the first bin.
      high: upper edge of the last bin.
      bins: how many bins.
    """
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1; got {bins}.")
    low, high = jnp.float32(low), jnp.float32(high)
    width = jnp.maximum((high - low) / bins, jnp.finfo(jnp.float32).tiny)

    def update(counts: jax.Array, x: jax.Array) -> jax.Array:
        places = jnp.floor((x.astype(jnp.float32) - low) / width)
        indices = jnp.clip(places, 0, bins - 1).astype(jnp.int32)
        return counts + jnp.bincount(indices.ravel(), length=bins).astype(jnp.float32)

    def final(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return counts, low + width * jnp.arange(bins + 1, dtype=jnp.float32)

    return Observer(lambda: jnp.zeros(bins, jnp.float32), jax.jit(update), final)


def percentile(
    percent: float, low: float | jax.Array, high: float | jax.Array, bins: int = 2048
) -> Observer:
    """The central range that holds `percent` of the values, from a histogram: (low, high).

    Each bound is within one bin, (high − low) / bins, of the exact percentile. Where `low` or
    `high` is 0 that side is kept and the other one takes the whole tail.

    Args:
      percent: share of the values to keep, above 0 and at most 100.
      low: smallest value that can occur.
      high: largest value that can occur.
      bins: resolution.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"`percent` must be above 0 and at most 100; got {percent}.")
    counter = histogram(low, high, bins)
    is_one_sided = (jnp.float32(low) == 0) | (jnp.float32(high) == 0)

    def final(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts, edges = counter.final(counts)
        cumulative = jnp.cumsum(counts) / jnp.sum(counts)
        tail = (1 - percent / 100) / jnp.where(is_one_sided, 1, 2)
        lower = edges[jnp.searchsorted(cumulative, tail, side="right")]
        upper = edges[jnp.minimum(jnp.searchsorted(cumulative, 1 - tail) + 1, bins)]
        lower = jnp.where(jnp.float32(low) == 0, 0, lower)
        upper = jnp.where(jnp.float32(high) == 0, 0, upper)
        return lower, upper

    return Observer(counter.init, counter.update, final)


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

    zeros = Moments(jnp.zeros((groups, patch)), jnp.zeros((groups, patch, patch)))
    return Observer(lambda: (jnp.zeros(()), zeros), update, _mean)


@partial(jax.jit, donate_argnums=0)
def centered(moments: Moments) -> Moments:
    """Takes the means out of the second moments: Cov[x] = E[x xᵀ] − E[x] E[x]ᵀ.

    Args:
      moments: they are used up, to hold one matrix rather than two.

    Returns:
      The same mean, and the covariance in place of the second moments.
    """
    mean = moments.mean
    return Moments(mean, moments.hessian - mean[:, :, None] * mean[:, None, :])


class CrossMoments(NamedTuple):
    """Moments of a residual r of a layer's output with its input patches x.

    Attributes:
      residual_mean: E[r], float32[groups, channels].
      cross: E[x rᵀ], float32[groups, patch, channels].
    """

    residual_mean: jax.Array
    cross: jax.Array


def cross_moments(operation: Linear, stride: int = 1) -> Observer:
    """The moments that tell which change of a layer's kernel makes up for a residual best.

    Args:
      operation: the layer's linear operation.
      stride: between the positions of a batch that are counted.

    Returns:
      An observer whose batches are pairs (layer input, residual of the operation's output) and
      whose statistic is a `CrossMoments`.
    """
    groups, patch, channels = operation.matrix_shape

    def update(
        state: tuple[jax.Array, CrossMoments], pair: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, CrossMoments]:
        return _add_residual(state, *pair, operation, stride)

    zeros = CrossMoments(jnp.zeros((groups, channels)), jnp.zeros((groups, patch, channels)))
    return Observer(lambda: (jnp.zeros(()), zeros), update, _mean)


def _mean(state: tuple[jax.Array, Any]) -> Any:
    count, sums = state
    return jax.tree.map(lambda total: total / count, sums)


_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("operation", "stride"))
def _add_patches(
    state: tuple[jax.Array, Moments], x: jax.Array, operation: Linear, stride: int
) -> tuple[jax.Array, Moments]:
    count, sums = state
    patches = operation.patches(x.astype(jnp.float32), stride)
    hessian = sums.hessian + _product("pgk,pgl->gkl", patches, patches)
    return count + patches.shape[0], Moments(sums.mean + patches.sum(0), hessian)


@partial(jax.jit, static_argnames=("operation", "stride"))
def _add_residual(
    state: tuple[jax.Array, CrossMoments],
    x: jax.Array,
    residual: jax.Array,
    operation: Linear,
    stride: int,
) -> tuple[jax.Array, CrossMoments]:
    count, sums = state
    patches = operation.patches(x.astype(jnp.float32), stride)
    missing = output_matrix(operation, residual)[::stride]
    cross = sums.cross + _product("pgk,pgm->gkm", patches, missing)
    return count + patches.shape[0], CrossMoments(sums.residual_mean + missing.sum(0), cross)
