"""Clipping ranges: the objective is the layer's error, and the search finds its least value."""

from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from qjax import QParams, QuantSpec
from qjax.fit import search
from qjax.fit.ranges import values_between
from qjax.fit.samples import InputSample, KernelSample, OutputSample, narrowed
from qjax.fit.search import CANDIDATES, Candidates, least
from qjax.formats.affine import affine_qparams, fake_quant
from qjax.graph.activation import NONE, RELU, Activation
from qjax.objectives.errors import OUTPUT_MSE, PROBABILITIES
from qjax.objectives.table import OBJECTIVES
from qjax.programs import program
from qjax.rounding.nearest import round_nearest

GRID = Candidates(20, refinements=0)
GRID_ALPHAS = np.arange(1, GRID.count + 1, dtype=np.float32) / np.float32(GRID.count)
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


@program(static_argnames=("spec", "method", "candidates"))  # else every call compiles its loops
def search_weights(
    kernel: Any, spec: QuantSpec, method: str = "output_mse", candidates: Candidates = CANDIDATES
) -> QParams:
    """The format of a kernel that an objective chooses, HESSIAN being that of its input."""
    return least(OBJECTIVES[method], KernelSample(kernel, spec, HESSIAN), spec, candidates)


def input_sample(patches: Any, extremes: tuple[Any, Any]) -> InputSample:
    columns = patches.transpose(1, 2, 0)
    return InputSample(patches[None], *extremes, columns, jnp.asarray(KERNEL))


def output_sample(z: Any, z_hat: Any, extremes: Any, activation: Activation = NONE) -> OutputSample:
    return OutputSample(z_hat[None], *extremes, z, z_hat, None, activation)


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
    qparams = search_weights(KERNEL, spec, method, GRID)
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
    qparams = least(OBJECTIVES[method], input_sample(PATCHES, extremes), spec, GRID)
    chex.assert_trees_all_close(qparams, affine_qparams(low, high, spec), rtol=1e-6)
    assert low > extremes[0] or high < extremes[1], "an example in which clipping pays"


OUTPUTS: Any = RNG.standard_t(4, 400).astype(np.float32)
OUTPUTS_HAT: Any = OUTPUTS + RNG.normal(size=400).astype(np.float32) / 8
EVERYTHING = NONE.bounds  # what the search is told of an activation, whose values it sees anyway
ACTIVATIONS: dict[str, tuple[Any, Any]] = {  # in JAX and in NumPy
    "identity": (NONE, lambda z: z),
    "relu": (RELU._replace(bounds=EVERYTHING), lambda z: np.maximum(z, 0)),
    "tanh": (Activation("tanh", EVERYTHING, jnp.tanh), np.tanh),
}


@each_range_spec
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lowest", [None, 0.0], ids=["two_sided", "from_zero"])
def test_output_equals_a_loop_over_the_candidates(
    spec: QuantSpec, activation: str, lowest: float | None
):
    jax_activation, act = ACTIVATIONS[activation]

    def loss(qparams: Loop) -> float:
        error = act(loop_fake_quant(OUTPUTS_HAT, qparams, spec)) - act(OUTPUTS)
        return float(np.mean(np.square(error, dtype=np.float64)))

    last = OUTPUTS_HAT.max()
    first: Any = OUTPUTS_HAT.min() if lowest is None else np.float32(lowest)
    low, high = loop_range(loss, first, last, spec)
    sample = output_sample(OUTPUTS, OUTPUTS_HAT, (first, last), jax_activation)
    qparams = least(OUTPUT_MSE, sample, spec, GRID)
    chex.assert_trees_all_close(qparams, affine_qparams(low, high, spec), rtol=1e-6)
    if activation == "relu" and lowest == 0.0:
        seen = values_between(OUTPUT_MSE, RELU, OUTPUTS[None], OUTPUTS_HAT[None])
        shown = output_sample(seen.target, seen.actual, seen.extremes, RELU)
        chex.assert_trees_all_equal(least(OUTPUT_MSE, shown, spec, GRID), qparams)


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
    qparams = least(PROBABILITIES, output_sample(z, z_hat, extremes), spec, GRID)
    chex.assert_trees_all_close(qparams, expected, rtol=1e-6)


# ---- Laws of the search


kernels = st_numpy.arrays(
    np.float32, KERNEL_SHAPE, elements=st.floats(-3, 3, width=16), fill=st.just(np.float32(0))
)
LAW_SPECS = st.sampled_from([QuantSpec(3), WEIGHT_SPECS["asymmetric"]])


def weight_loss(kernel: np.ndarray, qparams: QParams, method: str) -> np.ndarray:
    per_patch = jax.tree.map(
        lambda leaf: leaf.reshape(-1, 1, leaf.shape[-1]) if leaf.ndim else leaf, qparams
    )
    error = np.asarray(fake_quant(jnp.asarray(kernel), per_patch), np.float64) - kernel
    metric = HESSIAN if method == "output_mse" else np.eye(KERNEL_SHAPE[1])[None]
    return np.sum(error * (metric @ error), axis=1)


@pytest.mark.parametrize("method", ["mse", "output_mse"])
@hypothesis.given(kernels, LAW_SPECS)
def test_a_search_is_never_worse_than_absmax(method: str, kernel: np.ndarray, spec: QuantSpec):
    widest = search_weights(kernel, spec, "absmax", GRID)
    searched = search_weights(kernel, spec, method, GRID)
    loss = weight_loss(kernel, searched, method)
    assert np.all(loss <= weight_loss(kernel, widest, method) * (1 + 1e-4) + 1e-6)
    used = np.any(kernel != 0, axis=1, keepdims=True)
    assert np.all(np.where(used, searched.scale <= widest.scale * (1 + 1e-6), searched.scale == 1))


@hypothesis.given(kernels, LAW_SPECS)
def test_a_refined_grid_is_never_worse(kernel: np.ndarray, spec: QuantSpec):
    losses = [
        weight_loss(kernel, search_weights(kernel, spec, candidates=Candidates(8, n)), "output_mse")
        for n in range(3)
    ]
    for coarse, fine in zip(losses, losses[1:], strict=False):
        assert np.all(fine <= coarse * (1 + 1e-4) + 1e-6)


def test_refinement_finds_what_a_fine_grid_finds():
    """Many values make a smooth objective, whose least value both are near."""
    values: Any = RNG.normal(size=100_000).astype(np.float32)
    extremes = values.min(), values.max()

    def found(*candidates: int) -> float:
        spec = QuantSpec(4, granularity="per_tensor")
        sample = output_sample(values, values, extremes)
        return float(least(OUTPUT_MSE, sample, spec, Candidates(*candidates)).scale)

    fine, refined, coarse = found(500, 0), found(8, 1), found(8, 0)
    assert abs(refined / fine - 1) < 0.02 < abs(coarse / fine - 1)


@hypothesis.given(kernels, LAW_SPECS, st.permutations(range(KERNEL_SHAPE[2])))
def test_permuting_channels_commutes(kernel: np.ndarray, spec: QuantSpec, order: list[int]):
    qparams = search_weights(kernel, spec, "output_mse", GRID)
    permuted = search_weights(kernel[:, :, order], spec, "output_mse", GRID)
    np.testing.assert_array_equal(permuted.scale, np.asarray(qparams.scale)[:, :, order])
    np.testing.assert_array_equal(permuted.zero_point, np.asarray(qparams.zero_point)[:, :, order])


@each_spec
@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "output_mse"])
def test_ranges_lie_within_the_extremes(spec: QuantSpec, method: str):
    qparams = search_weights(KERNEL, spec, method, GRID)
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
        search_weights(KERNEL, spec, method, GRID) for method in ("output_mse", "mse")
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
        monkeypatch.setitem(search.CANDIDATE_BYTES, "cpu", 32 * together)
        chex.assert_trees_all_equal(search.map_candidates(loss, candidates, 8), expected)


# ---- Fixed point


def exponents_of(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The exponents to try: from the one that covers the range, down."""
    needed = np.maximum(-low, high) / np.float32(spec.qmax)
    return np.ceil(np.log2(needed)) - np.arange(8).reshape(-1, *[1] * needed.ndim)


def test_of_a_kernel_every_exponent_is_tried():
    spec = QuantSpec(3, scale="power_of_two")
    found = search_weights(KERNEL, spec)
    exponents = exponents_of(KERNEL.min(1), KERNEL.max(1), spec)
    errors = [
        loop_fake_quant(KERNEL, (np.exp2(e)[:, None], np.float32(0)), spec) - KERNEL
        for e in exponents
    ]
    losses = [np.einsum("gkm,gkl,glm->gm", e, HESSIAN, e) for e in errors]
    best = np.take_along_axis(exponents, np.argmin(losses, 0)[None], 0)[0]
    np.testing.assert_array_equal(found.scale[:, 0], np.exp2(best))
    assert np.any(best < exponents[0]), "some channel is clipped"


@pytest.mark.parametrize("least_value", [-0.05, -2.0, 0.0])
def test_of_an_activation_every_exponent_is_tried_with_a_sign_and_without(least_value: float):
    spec = QuantSpec(4, False, "per_tensor", scale="power_of_two")
    values = np.maximum(RNG.standard_t(4, 4000), least_value).astype(np.float32)
    sample = output_sample(values, values, (values.min(), values.max()))
    found = least(OBJECTIVES["mse"], sample, spec)
    losses = {}
    for scale in 2.0 ** np.arange(-12, 4):
        for low, high in ((0, 15), (-8, 7)):
            rounded = scale * np.clip(np.rint(values / scale), low, high)
            losses[scale, -low] = np.mean((rounded - values) ** 2)
    best = min(losses, key=losses.__getitem__)
    assert (float(found.scale), int(found.zero_point)) == best
    assert best[1] == (8 if least_value == -2.0 else 0), "a little below 0 is worth no sign bit"


@pytest.mark.parametrize("channels", [3, 17])
def test_a_narrowed_kernel_has_outputs_as_large(channels: int):
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(2, 5, channels)), rng.normal(size=(2, 5, 40))
    kernel[0, 2] = 0  # a row, and so the rank, is missing
    kernel, x = np.float32(kernel), np.float32(x)
    found = narrowed(jnp.asarray(kernel))
    assert found.shape == (2, 5, min(channels, 5))
    norms = [np.sum(np.square(np.einsum("gkm,gkp->gmp", w, x)), axis=1) for w in (kernel, found)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
