"""The divergence of codes from values: bin by bin, and what it chooses."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import QParams, QuantSpec
from qjax.fit.samples import KernelSample, OutputSample
from qjax.fit.search import Candidates, least
from qjax.formats.affine import affine_qparams
from qjax.objectives.divergence import KL, divergence
from qjax.objectives.errors import ABSMAX

RNG = np.random.default_rng(0)
KERNEL: Any = RNG.standard_t(4, (2, 10, 6)).astype(np.float32)
CANDIDATES = Candidates(20, refinements=0)
SPECS = {
    "per_channel": QuantSpec(4),
    "asymmetric": QuantSpec(3, symmetric=False),
    "per_tensor": QuantSpec(4, granularity="per_tensor"),
    "per_group": QuantSpec(3, granularity="per_group", group_size=4),  # of 4, 4 and 2 elements
    "per_group_asymmetric": QuantSpec(2, False, granularity="per_group", group_size=5),
}


def reference_divergence(counts: Any, centers: Any, qparams: QParams) -> float:
    """KL(P ‖ Q) bin by bin, in Python."""
    low, high = (float(end) for end in qparams.range)
    inside = [i for i, c in enumerate(centers) if low <= c <= high]
    p = {i: float(counts[i]) for i in inside}
    p[inside[0]] += float(sum(n for n, c in zip(counts, centers, strict=True) if c < low))
    p[inside[-1]] += float(sum(n for n, c in zip(counts, centers, strict=True) if c > high))
    members: dict[int, list[int]] = {}
    for i in inside:
        if counts[i]:
            members.setdefault(
                int(np.rint(np.float32(centers[i]) / np.asarray(qparams.scale))), []
            ).append(i)
    q = {i: sum(counts[j] for j in bins) / len(bins) for bins in members.values() for i in bins}
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(
        n / total_p * np.log(n / total_p / max(q.get(i, 0.0) / total_q, 1e-9))
        for i, n in p.items()
        if n
    )


@pytest.mark.parametrize("high", [0.3, 0.8, 2.5])
def test_the_divergence_is_that_of_clipped_values_from_their_codes(high: float):
    values: Any = RNG.standard_t(4, 5000).astype(np.float32)
    counts, edges = np.histogram(values, 200)
    centers = ((edges[:-1] + edges[1:]) / 2).astype(np.float32)
    qparams = affine_qparams(jnp.float32(-0.7 * high), jnp.float32(high), QuantSpec(4, False))
    loss = divergence((jnp.float32(counts), jnp.asarray(centers)), qparams)
    assert loss == pytest.approx(reference_divergence(counts, centers, qparams), rel=1e-3)


def test_the_divergence_clips_outliers_and_does_not_mind_zeros():
    values = np.abs(RNG.normal(size=20_000)).astype(np.float32)
    values[:3] = 40.0
    spec = QuantSpec(8, False, "per_tensor")
    extremes = jnp.float32(0), jnp.float32(40)
    ranges = []
    for zeros in (0, 50_000):
        batch = jnp.asarray(np.concatenate([values, np.zeros(zeros, np.float32)]))
        sample = OutputSample(batch[None], *extremes, batch, batch)
        ranges.append(float(least(KL, sample, spec).range[1]))
    assert 2.5 < ranges[0] < 8, "the range of the values, not of three outliers"
    assert ranges[0] == pytest.approx(ranges[1], rel=0.2)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_divergence_chooses_one_share_for_a_kernel(spec: QuantSpec):
    sample = KernelSample(KERNEL, spec)
    widest, chosen = (least(objective, sample, spec, CANDIDATES) for objective in (ABSMAX, KL))
    shares = np.asarray(chosen.scale / widest.scale)
    assert np.ptp(shares) < 1e-5
    assert np.min(np.abs(np.arange(1, 21) / 20 - shares.mean())) < 1e-5
