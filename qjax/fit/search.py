"""Clipping ranges by grid search, the candidates under `jax.vmap` in chunks of bounded memory.

A range is α·[low, high] of the extremes. A first grid lays α = 1/n, 2/n, … 1; each refinement lays
n candidates between the two neighbours of the best one so far. Of activations the two ends are
searched in turns, each for the other one found last; a symmetric range is searched as a whole, and
one that starts at 0 at its upper end alone. Where scales are powers of two, there are few different
ones and each is tried: of activations with codes for negative values and without.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.fit.samples import KernelSample, channel_sample
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import Activation
from qjax.objectives.base import Objective, Range

# What the candidates evaluated at the same time may take; on a CPU they are to stay in its cache.
CANDIDATE_BYTES = {"cpu": 2**24}
OTHERWISE_BYTES = 2**27

TURNS = 3  # of the search between the two ends of a range

Loss = Callable[[Any], jax.Array]


class Candidates(NamedTuple):
    """The candidates of a search.

    Attributes:
      count: n, candidates per pass.
      refinements: passes after the first, around the best candidate so far.
    """

    count: int = 32
    refinements: int = 1


CANDIDATES = Candidates()


def least(
    objective: Objective,
    sample: Any,
    spec: QuantSpec,
    candidates: Candidates = CANDIDATES,
    limits: Any = None,
) -> Any:
    """The format of least loss.

    Args:
      objective: what makes a range better than another.
      sample: the tensor, see `qjax.fit.samples`.
      spec: the number format.
      candidates: of the search.
      limits: of the width in question, see `QuantSpec.limits`; by default of the spec's own.

    Returns:
      A `Format` of the shape of the sample's ranges: scalars for an activation; for a kernel
      [groups, patch groups, channels], or [1, 1, 1] per tensor.

    Examples:
      >>> import jax.numpy as jnp
      >>> from qjax.objectives.errors import MSE
      >>> kernel = jnp.array([1.0, 1.0, -1.0, 5.0]).reshape(1, 4, 1)
      >>> spec = QuantSpec(2)
      >>> print(least(MSE, KernelSample(kernel, spec), spec).scale.ravel())
      [5.]
    """
    limits = spec.limits if limits is None else limits
    low, high = objective.extremes(sample)
    if (measure := objective.loss) is not None:

        def loss(ends: Range) -> jax.Array:
            return measure(sample, spec.cover(ends[0], ends[1], limits))

        if isinstance(sample, KernelSample):
            alpha = _kernel_share(objective, sample, spec, candidates, limits)
            low, high = alpha * low, alpha * high
        elif spec.scales.shares is not None:
            low, high = _best_listed_range(loss, (low, high), spec.scales.shares, sample.nbytes)
        elif objective.is_rugged:
            low, high = _best_pair(loss, (low, high), candidates.count, sample.nbytes)
        elif spec.symmetric:
            low, high = _shrunk_together(loss, (low, high), candidates, sample.nbytes)
        else:
            low, high = _shrunk_in_turns(loss, (low, high), candidates, sample.nbytes)
    return _without_block_axis(spec.cover(low, high, limits))


def widest(sample: Any, spec: QuantSpec, limits: Any = None) -> Any:
    """The format that covers all values; arguments as of `least`."""
    low, high = sample.extremes()
    limits = spec.limits if limits is None else limits
    return _without_block_axis(spec.cover(low, high, limits))


def _without_block_axis(format: Any) -> Any:
    """Takes the axis of a block's elements out of the format of blocks."""
    return jax.tree.map(lambda leaf: leaf[:, :, 0] if leaf.ndim > 2 else leaf, format)


def least_by_channel(
    objective: Objective,
    target: jax.Array,
    actual: jax.Array,
    shortcut: jax.Array,
    spec: QuantSpec,
    activation: Activation,
    candidates: Candidates = CANDIDATES,
    limits: Any = None,
) -> Any:
    """Chooses a clipping range for every channel.

    Args:
      objective: what makes a range better than another.
      target: z, a sample of the values to be had, float[channels, n].
      actual: ẑ, the values there to be quantized, of that shape.
      shortcut: s, what is added to them, of that shape.
      spec: the number format.
      activation: act.
      candidates: of the search.
      limits: as of `least`.

    Returns:
      Qparams float32[channels]; a channel of zeros has scale 1.
    """
    every_end = objective._replace(extremes=lambda sample: sample.extremes())

    def search(channel: tuple[jax.Array, ...]) -> Any:
        target, actual, shortcut = channel
        sample = channel_sample(target, actual, shortcut, activation)
        return least(every_end, sample, spec, candidates, limits)

    found = lax.map(search, (target, actual, shortcut))
    scalars = {"qmin": found.qmin[0], "qmax": found.qmax[0]}
    return found.__class__(found.scale, found.zero_point, **scalars, dtype=found.dtype)


# ---- Strategies


def _kernel_share(
    objective: Objective, sample: KernelSample, spec: QuantSpec, candidates: Candidates, limits: Any
) -> jax.Array:
    """The share of the extremes that is kept: for every scale, or one for the whole kernel."""
    measure = objective.loss
    assert measure is not None
    searched: Any = sample if objective.per_channel else sample.pooled()
    if not objective.per_channel:
        candidates = candidates._replace(refinements=0)
    low, high = objective.extremes(searched)

    def loss(alpha: jax.Array) -> jax.Array:
        return measure(searched, spec.cover(alpha * low, alpha * high, limits))

    if (listed := spec.scales.shares) is not None:
        return _best_listed_share(loss, low.shape, listed, searched.nbytes)
    return best_share(loss, low.shape, candidates, searched.nbytes)


def _shrunk_together(loss: Loss, ends: Range, candidates: Candidates, nbytes: int) -> Range:
    low, high = (jnp.asarray(end, jnp.float32) for end in ends)
    alpha = best_share(lambda alpha: loss((alpha * low, alpha * high)), (), candidates, nbytes)
    return alpha * low, alpha * high


def _shrunk_in_turns(loss: Loss, ends: Range, candidates: Candidates, nbytes: int) -> Range:
    lowest, highest = (jnp.asarray(end, jnp.float32) for end in ends)

    def turn(step: jax.Array, found: Range) -> Range:
        is_low = step % 2 == 1  # the upper end first
        low = jnp.where(is_low, lowest, found[0])
        high = jnp.where(is_low, found[1], highest)

        def shrunk(alpha: jax.Array) -> Range:
            return jnp.where(is_low, alpha * low, low), jnp.where(is_low, high, alpha * high)

        return shrunk(best_share(lambda alpha: loss(shrunk(alpha)), (), candidates, nbytes))

    count = jnp.where(lowest < 0, 2 * TURNS, 1)
    return lax.fori_loop(0, count, turn, (lowest, highest))


def _best_listed_range(loss: Loss, ends: Range, shares: tuple[float, ...], nbytes: int) -> Range:
    """The best of some shares of a range as a whole, or of its positive part alone."""
    low, high = (jnp.asarray(shares, jnp.float32) * end for end in ends)
    pairs = jnp.concatenate([jnp.stack([start, high], axis=1) for start in (low, 0 * low)])
    return _best_of(loss, pairs, nbytes)


def _best_listed_share(
    loss: Loss, shape: tuple[int, ...], shares: tuple[float, ...], nbytes: int
) -> jax.Array:
    """The best of some shares, elementwise for shares and losses of one `shape`."""
    listed = jnp.asarray(shares, jnp.float32)
    tried = jnp.broadcast_to(listed.reshape(-1, *(1 for _ in shape)), (len(shares), *shape))
    return listed[jnp.argmin(map_candidates(loss, tried, nbytes), axis=0)]


def _best_pair(loss: Loss, ends: Range, count: int, nbytes: int) -> Range:
    shares = jnp.arange(count + 1, dtype=jnp.float32) / count
    low, high = jnp.meshgrid(shares * ends[0], shares[1:] * ends[1])
    return _best_of(loss, jnp.stack([low.ravel(), high.ravel()], axis=1), nbytes)


def _best_of(loss: Loss, pairs: jax.Array, nbytes: int) -> Range:
    losses = map_candidates(lambda pair: loss((pair[0], pair[1])), pairs, nbytes)
    low, high = pairs[jnp.argmin(losses)]
    return low, high


def best_share(
    loss: Loss, shape: tuple[int, ...], candidates: Candidates, candidate_bytes: int
) -> jax.Array:
    """The α in (0, 1] of least loss, elementwise for α and losses of one `shape`."""
    count = candidates.count
    steps = jnp.arange(1, count + 1, dtype=jnp.float32).reshape(-1, *(1 for _ in shape))

    def search_pass(state: Any, _: None) -> tuple[Any, None]:
        low, width, (best, least) = state
        tried = jnp.clip(low[None] + width * steps / count, width / count / 2, 1)
        losses = map_candidates(loss, tried, candidate_bytes)
        position = jnp.argmin(losses, axis=0)[None]
        found, loss_found = (
            jnp.take_along_axis(values, position, axis=0, mode="promise_in_bounds")[0]
            for values in (tried, losses)
        )
        best = jnp.where(loss_found < least, found, best)
        step = width / count
        return (best - step, 2 * step, (best, jnp.minimum(least, loss_found))), None

    zeros, ones = jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32)
    start = (zeros, jnp.ones((), jnp.float32), (ones, jnp.full(shape, jnp.inf, jnp.float32)))
    (_, _, (best, _)), _ = lax.scan(search_pass, start, length=candidates.refinements + 1)
    return best


def map_candidates(loss: Loss, candidates: jax.Array, candidate_bytes: int) -> jax.Array:
    """Evaluates a loss on every candidate, as many at a time as memory allows.

    Args:
      loss: of one candidate.
      candidates: float[n, ...].
      candidate_bytes: the size of the largest array that one candidate needs.

    Returns:
      The losses, float[n, ...].
    """
    count = len(candidates)
    bytes_together = CANDIDATE_BYTES.get(jax.default_backend(), OTHERWISE_BYTES)
    fitting = max(1, bytes_together // max(4 * candidate_bytes, 1))
    together = max(d for d in range(1, count + 1) if count % d == 0 and d <= fitting)
    if together == count:
        return jax.vmap(loss)(candidates)
    return lax.map(loss, candidates, batch_size=together)
