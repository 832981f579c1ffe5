"""Divergences: of the distribution of codes from that of the values, and of classes."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.objectives.base import Objective, Sample

HISTOGRAM_BINS = 2048  # of the distributions that are compared
TEMPERATURE = 4.0  # of logits, where networks are fitted to each other


def without_spike_at_zero(counts: jax.Array, edges: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(counts, centers of the bins), with a spike at 0 cut down to the bins next to it.

    0 is exact in every candidate; the many zeros after a ReLU would outweigh everything else.
    """
    counts = counts.astype(jnp.float32)
    bins = len(counts)
    zero = jnp.clip(jnp.searchsorted(edges, 0.0, side="right") - 1, 0, bins - 1)
    left = jnp.where(zero > 0, counts[zero - 1], 0.0)
    right = jnp.where(zero < bins - 1, counts[jnp.minimum(zero + 1, bins - 1)], 0.0)
    return counts.at[zero].min(jnp.maximum(left, right)), (edges[:-1] + edges[1:]) / 2


def divergence(data: tuple[jax.Array, jax.Array], format: Any) -> jax.Array:
    """KL(P ‖ Q) = Σ P log(P / Q) between the distributions of clipped values and of their codes.

    P is the histogram inside the range, what lies outside added to its end bins. Q spreads the
    count that a code has inside the range evenly over its bins that are not empty.

    Args:
      data: counts and centers of the bins, float[bins] each.
      format: scalars.

    Returns:
      float32 scalar in nats.

    References:
      Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    counts, centers = data
    low, high = format.project(jnp.array([-jnp.inf, jnp.inf], jnp.float32))
    is_inside = (centers >= low) & (centers <= high)
    kept = jnp.where(is_inside, counts, 0.0)
    clipped = jnp.clip(
        jnp.searchsorted(centers, jnp.stack([low, high])) - jnp.array([0, 1], jnp.int32), 0
    )
    below, above = (
        jnp.sum(jnp.where(side, counts, 0.0)) for side in (centers < low, centers > high)
    )
    p = kept.at[clipped].add(jnp.stack([below, above]), mode="clip")
    codes = format.encode(centers).astype(jnp.int32)
    # Codes rise with the values, so that a bin's number among different codes will do for its code.
    ranks = jnp.cumsum(jnp.diff(codes, prepend=codes[:1]) != 0)
    mass, bins = (
        jax.ops.segment_sum(values, ranks, len(centers))[ranks]
        for values in (kept, (kept > 0).astype(jnp.float32))
    )
    q = jnp.where(kept > 0, mass / jnp.maximum(bins, 1.0), 0.0)
    p, q = (values / jnp.maximum(jnp.sum(values), 1e-30) for values in (p, q))
    return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-9)), 0.0))


def divergence_of_classes(
    wanted: jax.Array, found: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """T²·KL(softmax(f / T) ‖ softmax(f̂ / T)) of logits, for every example.

    A temperature above 1 lets more than the greatest logits count; the factor T² keeps the size of
    the gradient.

    Args:
      wanted: f, float[..., classes].
      found: f̂, of that shape.
      temperature: T.

    Returns:
      float32[...] in nats.

    References:
      Hinton et al., 2015, arXiv:1503.02531, section 2.

    Examples:
      >>> f = jnp.log(jnp.array([0.5, 0.5]))
      >>> print(f"{divergence_of_classes(f, jnp.log(jnp.array([0.25, 0.75]))):.4f}")
      0.1438
    """
    p, q = (jax.nn.log_softmax(f.astype(jnp.float32) / temperature) for f in (wanted, found))
    return temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _loss(sample: Sample, format: Any) -> jax.Array:
    return divergence(sample.distribution(), format)


KL = Objective("kl", "divergence (KL)", False, lambda sample: sample.extremes(), _loss)
