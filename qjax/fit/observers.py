"""Calibration statistics, accumulated over batches in constant memory.

An observer is a triple of pure functions over an immutable state. All but `moving_average` give the
same result however the same values are split into batches, up to the rounding of sums.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


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


def observe_stacked(observer: Observer, batches: Any) -> Any:
    """Runs an observer over batches that are stacked on a leading axis, under `jax.jit`."""

    def update(state: Any, batch: Any) -> tuple[Any, None]:
        return observer.update(state, batch), None

    if len(jax.tree.leaves(batches)[0]) == 1:
        return observe(observer, [jax.tree.map(lambda leaf: leaf[0], batches)])
    state, _ = lax.scan(update, observer.init(), batches)
    return observer.final(state)


def _no_extremes() -> tuple[jax.Array, jax.Array]:
    return jnp.float32(jnp.inf), jnp.float32(-jnp.inf)


@jax.jit
def _add_extremes(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = state
    x = x.astype(jnp.float32)
    return jnp.minimum(low, x.min()), jnp.maximum(high, x.max())


def min_max() -> Observer:
    """The extremes: (min, max), float32 scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> low, high = observe(min_max(), [jnp.array([1.0, -2.0]), jnp.array([3.0])])
      >>> float(low), float(high)
      (-2.0, 3.0)
    """
    return Observer(_no_extremes, _add_extremes, lambda state: state)


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
        return jnp.full(2, jnp.nan, jnp.float32), jnp.array(False)

    def update(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _blend_extremes(state, x, decay)

    return Observer(init, update, lambda state: tuple(state[0]))


@partial(jax.jit, static_argnames="decay")
def _blend_extremes(
    state: tuple[jax.Array, jax.Array], x: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    average, is_started = state
    extremes = jnp.stack([x.min(), x.max()]).astype(jnp.float32)
    blended = decay * average + (1 - decay) * extremes
    return jnp.where(is_started, blended, extremes), jnp.array(True)


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
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    width = jnp.maximum((high - low) / bins, jnp.finfo(jnp.float32).tiny)

    def update(counts: jax.Array, x: jax.Array) -> jax.Array:
        return _count(counts, x, low, width)

    def final(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return counts, low + width * jnp.arange(bins + 1, dtype=jnp.float32)

    return Observer(lambda: jnp.zeros(bins, jnp.float32), update, final)


@jax.jit
def _count(counts: jax.Array, x: jax.Array, low: jax.Array, width: jax.Array) -> jax.Array:
    """Adds the values to the counts of their bins, of which the first begins at `low`."""
    bins = len(counts)
    places = jnp.floor((x.astype(jnp.float32) - low) / width)
    indices = jnp.clip(places, 0, bins - 1).astype(jnp.int32)
    return counts + jnp.bincount(indices.ravel(), length=bins).astype(jnp.float32)


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
    least, greatest = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    is_one_sided = (least == 0) | (greatest == 0)

    def final(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts, edges = counter.final(counts)
        cumulative = jnp.cumsum(counts) / jnp.sum(counts)
        tail = (1 - percent / 100) / jnp.where(is_one_sided, 1, 2)
        lower = edges[jnp.searchsorted(cumulative, tail, side="right")]
        upper = edges[jnp.minimum(jnp.searchsorted(cumulative, 1 - tail) + 1, bins)]
        lower = jnp.where(least == 0, 0, lower)
        upper = jnp.where(greatest == 0, 0, upper)
        return lower, upper

    return Observer(counter.init, counter.update, final)
