"""Clipping ranges: the objective is the layer's error, and the search finds its least value."""

from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from qjax import QParams, QuantSpec
from qjax.fit import observers, search
from qjax.fit.rounding import round_nearest
from qjax.fit.search import Grid, kernel_loss, search_input, search_output, search_weights
from qjax.formats.affine import affine_qparams, fake_quant

GRID = Grid(20, refinements=0)
GRID_ALPHAS = np.arange(1, GRID.size + 1, dtype=np.float32) / np.float32(GRID.size)
KERNEL_SHAPE = (2, 10, 6)
RNG = np.random.default_rng(0)
KERNEL: Any = RNG.standard_t(4, KERNEL_SHAPE).astype(np.float32)  # heavy tails: clipping pays
PATCHES: Any = (RNG.normal(size=(50, 2, 10)) * RNG.uniform(0.2, 3, (2, 10)) + 0.3).astype(
    np.float32
)
HESSIAN: Any = np.einsum("pgk,pgl->gkl", PATCHES, PATCHES) / np.float32(len(PATCHES))

WEIGHT_SPECS = {
    "per_channel": QuantSpec(4),
    "asymmetric": QuantSpec(3, symmetric=False),
    "per_tensor": QuantSpec(4, granularity="per_tensor"),
    "per_group": QuantSpec(3, granularity="per_group", group_size=4),  # of 4, 4 and 2 elements
    "per_group_asymmetric": QuantSpec(2, False, granularity="per_group", group_size=5),
}
each_spec = pytest.mark.parametrize("spec", WEIGHT_SPECS.values(), ids=WEIGHT_SPECS.keys())
Loop = tuple[Any, Any]  # scale, zero_point


# ---- The objective


@pytest.mark.parametrize("case", operations.CASES, ids=lambda case: case.id)
def test_the_weight_objective_is_the_mean_squared_error_of_the_output(case: operations.Case):
    operation, x, kernel = case.operation, case.x, case.kernel
    kernel_hat: Any = np.round(np.asarray(kernel) * 2) / 2
    y, y_hat = (operations.apply(operation, x, k) for k in (kernel, jnp.asarray(kernel_hat)))
    error = operations.by_channel(operation, np.asarray(y_hat, np.float64) - np.asarray(y))
    moments = observers.observe(observers.moments(operation), [x])
    loss = kernel_loss(operation.to_matrix(kernel_hat - np.asarray(kernel)), moments.hessian)
    np.testing.assert_allclose(loss, np.mean(error**2, axis=0), rtol=1e-4)


def test_without_a_hessian_the_objective_is_the_squared_error_of_the_kernel():
    loss = kernel_loss(jnp.asarray(KERNEL), None)
    np.testing.assert_allclose(loss, np.sum(KERNEL**2, axis=1), rtol=1e-6)


@pytest.mark.parametrize(("patch", "groups"), [(10, 1), (10, 3), (10, 5), (9, 2)])
def test_diagonal_blocks(patch: int, groups: int):
    hessian = RNG.normal(size=(2, patch, patch)).astype(np.float32)
    hessian += hessian.transpose(0, 2, 1)
    size = -(-patch // groups)
    expected = np.zeros((2, groups, size, size), np.float32)
    for block in range(groups):
        part = hessian[:, block * size : (block + 1) * size, block * size : (block + 1) * size]
        expected[:, block, : part.shape[1], : part.shape[2]] = part
    np.testing.assert_array_equal(search.diagonal_blocks(jnp.asarray(hessian), groups), expected)


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_join_patch_inverts_split_patch(groups: int):
    blocks = search.split_patch(jnp.asarray(KERNEL), groups)
    assert blocks.shape == (2, groups, -(-10 // groups), 6)
    np.testing.assert_array_equal(search.join_patch(blocks, 10), KERNEL)


# ---- A plain loop over the candidates, in NumPy


def loop_qparams(low: Any, high: Any, spec: QuantSpec) -> Loop:
    if spec.symmetric:
        scale = np.maximum(-low, high) / np.float32(spec.qmax)
        return scale, np.float32(0)
    scale = (high - low) / np.float32(spec.qmax - spec.qmin)
    return scale, np.clip(np.rint(-low / scale), spec.qmin, spec.qmax)


def loop_fake_quant(x: np.ndarray, qparams: Loop, spec: QuantSpec) -> np.ndarray:
    scale, zero_point = qparams
    return scale * np.clip(np.rint(x / scale), spec.qmin - zero_point, spec.qmax - zero_point)


def loop_weights(spec: QuantSpec, method: str) -> Loop:
    """Tries one candidate after the other on one block of KERNEL after the other."""
    groups, patch, channels = KERNEL.shape
    size = spec.group_size if spec.granularity == "per_group" else patch
    spans = [slice(start, start + size) for start in range(0, patch, size)]
    shape = (groups, len(spans), channels)
    least, best_scale, best_zero_point = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
    is_searched = method in ("mse", "output_mse")
    for alpha in GRID_ALPHAS if is_searched else GRID_ALPHAS[-1:]:
        scale, zero_point, loss = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for g, b, c in np.ndindex(shape):
            w, hessian = KERNEL[g, spans[b], c], HESSIAN[g, spans[b], spans[b]]
            values = KERNEL if spec.granularity == "per_tensor" else w
            low, high = values.min(), values.max()
            if method == "percentile":
                magnitude = np.percentile(np.abs(values), 99.9)
                low, high = max(low, -magnitude), min(high, magnitude)
            qparams = loop_qparams(alpha * min(low, 0), alpha * max(high, 0), spec)
            error = loop_fake_quant(w, qparams, spec) - w
            metric = hessian if method == "output_mse" else np.eye(len(w))
            scale[g, b, c], zero_point[g, b, c] = qparams
            loss[g, b, c] = error @ metric @ error
        if spec.granularity == "per_tensor":
            loss[:] = loss.sum()
        better = loss < least
        best_scale[better], best_zero_point[better] = scale[better], zero_point[better]
        least = np.minimum(loss, least)
    return best_scale, best_zero_point


@each_spec
@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "output_mse"])
def test_weights_equal_a_loop_over_the_candidates(spec: QuantSpec, method: str):
    scale, zero_point = loop_weights(spec, method)
    qparams = search_weights(KERNEL, HESSIAN, spec, method, GRID)
    if spec.granularity == "per_tensor":
        chex.assert_shape(qparams.scale, (1, 1, 1))
    else:
        chex.assert_shape(qparams.scale, scale.shape)
    # The zeros that fill up the last group count among the values of a percentile.
    rtol = 1e-2 if method == "percentile" and scale.shape[1] == 3 else 1e-6
    np.testing.assert_allclose(np.broadcast_to(qparams.scale, scale.shape), scale, rtol=rtol)
    found = np.broadcast_to(qparams.zero_point, scale.shape)
    np.testing.assert_array_equal(found, zero_point)


def loop_range(
    loss: Callable[[Loop], float], low: Any, high: Any, spec: QuantSpec
) -> tuple[Any, Any]:
    """Tries the upper ends of a range and the lower ends in turns; of a symmetric range both."""

    def least(candidates: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        return min(candidates, key=lambda ends: loss(loop_qparams(*ends, spec)))

    ends = np.float32(low), np.float32(high)
    if spec.symmetric:
        return least([(alpha * ends[0], alpha * ends[1]) for alpha in GRID_ALPHAS])
    first = ends[0]
    for _ in range(3 if low < 0 else 1):
        chosen = least([(first, alpha * ends[1]) for alpha in GRID_ALPHAS])
        if low < 0:
            chosen = least([(alpha * ends[0], chosen[1]) for alpha in GRID_ALPHAS])
        first = chosen[0]
    return chosen


RANGE_SPECS = {
    "asymmetric": QuantSpec(3, symmetric=False, granularity="per_tensor"),
    "symmetric": QuantSpec(4, granularity="per_tensor"),
}
each_range_spec = pytest.mark.parametrize("spec", RANGE_SPECS.values(), ids=RANGE_SPECS.keys())


@each_range_spec
@pytest.mark.parametrize("method", ["mse", "output_mse"])
def test_input_equals_a_loop_over_the_candidates(spec: QuantSpec, method: str):
    def loss(qparams: Loop) -> float:
        error = loop_fake_quant(PATCHES, qparams, spec) - PATCHES
        error = np.einsum("pgk,gkm->pgm", error, KERNEL) if method == "output_mse" else error
        return float(np.mean(np.square(error, dtype=np.float64)))

    extremes = PATCHES.min(), PATCHES.max()
    low, high = loop_range(loss, *extremes, spec)
    qparams = search_input(PATCHES, KERNEL, extremes, spec, method, GRID)
    chex.assert_trees_all_close(qparams, affine_qparams(low, high, spec), rtol=1e-6)
    assert low > extremes[0] or high < extremes[1], "an example in which clipping pays"


OUTPUTS: Any = RNG.standard_t(4, 400).astype(np.float32)
OUTPUTS_HAT: Any = OUTPUTS + RNG.normal(size=400).astype(np.float32) / 8
ACTIVATIONS: dict[str, tuple[Any, Any]] = {  # in JAX and in NumPy
    "identity": (lambda z: z, lambda z: z),
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
    "tanh": (jnp.tanh, np.tanh),
}


@each_range_spec
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("least", [None, 0.0], ids=["two_sided", "from_zero"])
def test_output_equals_a_loop_over_the_candidates(
    spec: QuantSpec, activation: str, least: float | None
):
    jax_activation, act = ACTIVATIONS[activation]

    def loss(qparams: Loop) -> float:
        error = act(loop_fake_quant(OUTPUTS_HAT, qparams, spec)) - act(OUTPUTS)
        return float(np.mean(np.square(error, dtype=np.float64)))

    last = OUTPUTS_HAT.max()
    first: Any = OUTPUTS_HAT.min() if least is None else np.float32(least)
    low, high = loop_range(loss, first, last, spec)
    qparams = search_output(OUTPUTS, OUTPUTS_HAT, (first, last), spec, jax_activation, GRID)
    chex.assert_trees_all_close(qparams, affine_qparams(low, high, spec), rtol=1e-6)


@each_range_spec
def test_logits_equal_a_loop_over_the_candidates(spec: QuantSpec):
    z, z_hat = (3 * values.reshape(-1, 10) for values in (OUTPUTS, OUTPUTS_HAT))

    def roots(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits.astype(np.float64))
        return np.sqrt(powers / powers.sum(-1, keepdims=True))

    def loss(ends: tuple[Any, Any]) -> float:
        error = roots(loop_fake_quant(z_hat, loop_qparams(*ends, spec), spec)) - roots(z)
        return float(np.sum(np.square(error)))

    extremes = z_hat.min(), z_hat.max()
    candidates = [
        (np.float32(low) * extremes[0], high * extremes[1])
        for low in (0, *GRID_ALPHAS)
        for high in GRID_ALPHAS
    ]
    expected = affine_qparams(*min(candidates, key=loss), spec)
    qparams = search.search_logits(z, z_hat, extremes, spec, GRID)
    chex.assert_trees_all_close(qparams, expected, rtol=1e-6)


# ---- Laws of the search


kernels = st_numpy.arrays(
    np.float32, KERNEL_SHAPE, elements=st.floats(-3, 3, width=16), fill=st.just(np.float32(0))
)
LAW_SPECS = st.sampled_from([QuantSpec(3), WEIGHT_SPECS["asymmetric"]])


def weight_loss(kernel: np.ndarray, qparams: QParams, method: str) -> np.ndarray:
    per_patch = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, leaf.shape[-1]), qparams)
    error = np.asarray(fake_quant(jnp.asarray(kernel), per_patch), np.float64) - kernel
    metric = HESSIAN if method == "output_mse" else np.eye(KERNEL_SHAPE[1])[None]
    return np.sum(error * (metric @ error), axis=1)


@pytest.mark.parametrize("method", ["mse", "output_mse"])
@hypothesis.given(kernels, LAW_SPECS)
def test_a_search_is_never_worse_than_absmax(method: str, kernel: np.ndarray, spec: QuantSpec):
    widest = search_weights(kernel, HESSIAN, spec, "absmax", GRID)
    searched = search_weights(kernel, HESSIAN, spec, method, GRID)
    loss = weight_loss(kernel, searched, method)
    assert np.all(loss <= weight_loss(kernel, widest, method) * (1 + 1e-4) + 1e-6)
    used = np.any(kernel != 0, axis=1, keepdims=True)
    assert np.all(np.where(used, searched.scale <= widest.scale * (1 + 1e-6), searched.scale == 1))


@hypothesis.given(kernels, LAW_SPECS)
def test_a_refined_grid_is_never_worse(kernel: np.ndarray, spec: QuantSpec):
    losses = [
        weight_loss(kernel, search_weights(kernel, HESSIAN, spec, grid=Grid(8, n)), "output_mse")
        for n in range(3)
    ]
    for coarse, fine in zip(losses, losses[1:], strict=False):
        assert np.all(fine <= coarse * (1 + 1e-4) + 1e-6)


def test_refinement_finds_what_a_fine_grid_finds():
    """Many values make a smooth objective, whose least value both are near."""
    values: Any = RNG.normal(size=100_000).astype(np.float32)
    extremes = values.min(), values.max()

    def found(grid: Grid) -> float:
        spec = QuantSpec(4, granularity="per_tensor")
        scale = search_output(values, values, extremes, spec, lambda z: z, grid).scale
        return float(scale)

    fine, refined, coarse = (found(grid) for grid in (Grid(500, 0), Grid(8, 1), Grid(8, 0)))
    assert abs(refined / fine - 1) < 0.02 < abs(coarse / fine - 1)


@hypothesis.given(kernels, LAW_SPECS, st.permutations(range(KERNEL_SHAPE[2])))
def test_permuting_channels_commutes(kernel: np.ndarray, spec: QuantSpec, order: list[int]):
    qparams = search_weights(kernel, HESSIAN, spec, "output_mse", GRID)
    permuted = search_weights(kernel[:, :, order], HESSIAN, spec, "output_mse", GRID)
    np.testing.assert_array_equal(permuted.scale, np.asarray(qparams.scale)[:, :, order])
    np.testing.assert_array_equal(permuted.zero_point, np.asarray(qparams.zero_point)[:, :, order])


@each_spec
@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "output_mse"])
def test_ranges_lie_within_the_extremes(spec: QuantSpec, method: str):
    qparams = search_weights(KERNEL, HESSIAN, spec, method, GRID)
    low, high = (np.asarray(bound) for bound in qparams.range)
    slack = np.asarray(qparams.scale) / 2 * (1 + 1e-5)  # a zero point is rounded
    magnitude = np.abs(KERNEL).max()
    assert np.all(high <= magnitude + slack) and np.all(low >= -magnitude - slack)
    codes = np.asarray(round_nearest(jnp.asarray(KERNEL), qparams))
    assert codes.dtype == qparams.dtype and codes.shape == KERNEL_SHAPE
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    assert len(np.unique(codes)) > 2


def test_output_mse_has_the_smaller_output_error_and_mse_the_smaller_weight_error():
    spec = QuantSpec(3)
    by_output, by_weight = (
        search_weights(KERNEL, HESSIAN, spec, method, GRID) for method in ("output_mse", "mse")
    )
    for method, better, worse in (
        ("output_mse", by_output, by_weight),
        ("mse", by_weight, by_output),
    ):
        assert weight_loss(KERNEL, better, method).sum() < weight_loss(KERNEL, worse, method).sum()


@pytest.mark.parametrize("count", [20, 7])
def test_the_size_of_a_chunk_of_candidates_does_not_matter(
    count: int, monkeypatch: pytest.MonkeyPatch
):
    def loss(alpha: Any) -> Any:
        return jnp.stack([alpha**2, 1 - alpha])

    candidates = jnp.arange(count, dtype=jnp.float32)
    expected = search.map_candidates(loss, candidates, 8)
    for together in (1, 5, 10):
        monkeypatch.setattr(search, "CANDIDATE_BYTES", 32 * together)
        chex.assert_trees_all_equal(search.map_candidates(loss, candidates, 8), expected)


# ---- Divergence


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
    loss = search.entropy_loss((jnp.float32(counts), jnp.asarray(centers)), qparams, None)
    assert loss == pytest.approx(reference_divergence(counts, centers, qparams), rel=1e-3)


def test_the_divergence_clips_outliers_and_does_not_mind_zeros():
    values = np.abs(RNG.normal(size=20_000)).astype(np.float32)
    values[:3] = 40.0
    spec = QuantSpec(8, False, "per_tensor")
    extremes = jnp.float32(0), jnp.float32(40)
    counter = observers.histogram(*extremes, bins=search.HISTOGRAM_BINS)
    ranges = []
    for zeros in (0, 50_000):
        batch = jnp.asarray(np.concatenate([values, np.zeros(zeros, np.float32)]))
        histogram = observers.observe(counter, [batch])
        ranges.append(float(search.search_entropy(histogram, extremes, spec).range[1]))
    assert 2.5 < ranges[0] < 8, "the range of the values, not of three outliers"
    assert ranges[0] == pytest.approx(ranges[1], rel=0.2)


@each_spec
def test_the_divergence_chooses_one_share_for_a_kernel(spec: QuantSpec):
    widest = search_weights(KERNEL, HESSIAN, spec, "absmax")
    chosen = search_weights(KERNEL, HESSIAN, spec, "kl", GRID)
    shares = np.asarray(chosen.scale / widest.scale)
    assert np.ptp(shares) < 1e-5
    assert np.min(np.abs(GRID_ALPHAS - shares.mean())) < 1e-5
