"""Rounding: GPTQ is what its paper says, and every method lowers the error it is meant to lower."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qjax import QParams, QuantSpec
from qjax.fit.samples import KernelSample, kernel_loss
from qjax.fit.search import least
from qjax.formats.base import elementwise
from qjax.objectives.errors import OUTPUT_MSE
from qjax.programs import program
from qjax.rounding.base import MOMENTS, Problem
from qjax.rounding.gptq import BLOCK, round_gptq
from qjax.rounding.metric import DAMPING, least_squares_shift
from qjax.rounding.nearest import round_nearest
from qjax.rounding.sweeps import coordinate_sweeps
from qjax.rounding.table import ROUNDINGS

SPECS = {
    "per_channel": QuantSpec(3),
    "asymmetric": QuantSpec(2, symmetric=False),
    "per_tensor": QuantSpec(4, granularity="per_tensor"),
    "per_group": QuantSpec(3, granularity="per_group", group_size=8),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
gptq = program()(round_gptq)  # else every call compiles its loops


def problem(groups: int, patch: int, channels: int, seed: int = 0) -> tuple[Any, Any]:
    """A kernel, and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups, patch, patch)) / np.sqrt(patch) + np.eye(patch)
    x = rng.normal(size=(groups, 4 * patch, patch)) * rng.uniform(0.3, 2, patch) @ mix
    hessian = np.einsum("gpk,gpl->gkl", x, x) / x.shape[1]
    kernel = rng.normal(size=(groups, patch, channels))
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(hessian, jnp.float32)


@program(static_argnames="spec")
def covering(kernel: Any, hessian: Any, spec: QuantSpec) -> Any:
    """The format of least output error."""
    return least(OUTPUT_MSE, KernelSample(kernel, spec, hessian), spec)


def loss(codes: jax.Array, kernel: jax.Array, hessian: jax.Array, qparams: QParams) -> float:
    kernel_hat = elementwise(qparams, kernel.shape[1]).decode(codes)
    return float(jnp.sum(kernel_loss(kernel_hat - kernel, hessian)))


def gptq_of_the_paper(kernel: Any, hessian: Any, qparams: QParams) -> np.ndarray:
    """Algorithm 1 with the upper Cholesky factor of the inverse, one column at a time."""
    patch = kernel.shape[1]
    full = elementwise(qparams, patch)
    scales, zero_points = (
        np.broadcast_to(leaf, kernel.shape) for leaf in (full.scale, full.zero_point)
    )
    codes = np.zeros(kernel.shape, np.int64)
    for g in range(kernel.shape[0]):
        h = np.asarray(hessian[g], np.float64)
        h = h + DAMPING * np.mean(np.diag(h)) * np.eye(patch)
        order = np.argsort(-np.diag(h))
        upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
        w = np.asarray(kernel[g], np.float64)[order]
        for k, position in enumerate(order):
            scale, zero_point = scales[g, position], zero_points[g, position]
            code = np.clip(np.rint(w[k] / scale) + zero_point, full.qmin, full.qmax)
            error = (w[k] - scale * (code - zero_point)) / upper[k, k]
            w[k + 1 :] -= upper[k, k + 1 :, None] * error
            codes[g, position] = code
    return codes


@each_spec
@pytest.mark.parametrize("patch", [7, 24, BLOCK + 32], ids="patch_{}".format)
def test_gptq_is_the_algorithm_of_its_paper(spec: QuantSpec, patch: int):
    kernel, hessian = problem(2, patch, 5)
    qparams = covering(kernel, hessian, spec)
    codes = np.asarray(gptq(kernel, hessian, qparams), np.int64)
    expected = gptq_of_the_paper(kernel, hessian, qparams)
    # In float32 a value may fall on the other side of a half, and the rest of its column follows.
    same = np.all(codes == expected, axis=1)
    assert np.mean(same) >= 0.8


@each_spec
def test_gptq_trades_kernel_error_for_output_error(spec: QuantSpec):
    kernel, hessian = problem(2, 48, 16)
    qparams = covering(kernel, hessian, spec)
    nearest, rounded = round_nearest(kernel, qparams), gptq(kernel, hessian, qparams)
    identity = jnp.broadcast_to(jnp.eye(48), hessian.shape)
    assert loss(rounded, kernel, hessian, qparams) < 0.9 * loss(nearest, kernel, hessian, qparams)
    assert loss(rounded, kernel, identity, qparams) > loss(nearest, kernel, identity, qparams)


def test_with_uncorrelated_inputs_gptq_rounds_to_nearest():
    kernel, _ = problem(2, 20, 6)
    hessian = jnp.broadcast_to(jnp.diag(jnp.arange(1.0, 21.0)), (2, 20, 20))
    qparams = covering(kernel, hessian, QuantSpec(3))
    np.testing.assert_array_equal(gptq(kernel, hessian, qparams), round_nearest(kernel, qparams))


def test_gptq_takes_an_input_that_never_fires():
    kernel, hessian = problem(1, 12, 3)
    hessian = hessian.at[:, 4].set(0).at[:, :, 4].set(0)
    codes = gptq(kernel, hessian, covering(kernel, hessian, QuantSpec(4)))
    assert np.abs(codes).max() <= 7 and np.abs(codes).max() > 0


@hypothesis.given(st.integers(0, 2**16), st.permutations(range(6)))
def test_permuting_output_channels_commutes(seed: int, order: list[int]):
    kernel, hessian = problem(1, 16, 6, seed)
    qparams = covering(kernel, hessian, QuantSpec(3))
    permuted = jax.tree.map(
        lambda leaf: leaf[:, :, jnp.array(order)] if leaf.ndim else leaf, qparams
    )
    codes = gptq(kernel[:, :, jnp.array(order)], hessian, permuted)
    agree = np.asarray(codes) == np.asarray(gptq(kernel, hessian, qparams))[:, :, order]
    assert np.mean(agree) > 0.95, "up to ties in float32"


@each_spec
def test_every_sweep_lowers_the_output_error(spec: QuantSpec):
    kernel, hessian = problem(2, 24, 8)
    qparams = covering(kernel, hessian, spec)
    codes = gptq(kernel, hessian, qparams)
    losses = [loss(codes, kernel, hessian, qparams)]
    for sweeps in (1, 2, 4):
        swept = coordinate_sweeps(codes, kernel, hessian, qparams, sweeps)
        losses.append(loss(swept[0], kernel, hessian, swept[1]))
    assert losses[1] < losses[0] and losses[2] <= losses[1] * 1.001
    assert losses[3] <= losses[2] * 1.001


def test_the_least_squares_shift_solves_the_normal_equations():
    _, hessian = problem(2, 10, 1)
    cross = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 4)), jnp.float32)
    h = np.asarray(hessian, np.float64)
    h += DAMPING * np.mean(np.diagonal(h, axis1=1, axis2=2), 1)[:, None, None] * np.eye(10)
    expected = np.linalg.solve(h, np.asarray(cross, np.float64))
    np.testing.assert_allclose(least_squares_shift(hessian, cross), expected, rtol=1e-3, atol=1e-4)


def test_gptq_holds_three_matrices_of_the_size_of_the_hessian():
    """The Hessian, its damped permutation and the factor; the rest is of the kernel's size."""
    patch, channels = 4608, 512
    kernel = jax.ShapeDtypeStruct((1, patch, channels), jnp.float32)
    hessian = jax.ShapeDtypeStruct((1, patch, patch), jnp.float32)
    row = jax.ShapeDtypeStruct((1, 1, channels), jnp.float32)
    qparams = QParams(row, jax.ShapeDtypeStruct(row.shape, jnp.int32), -7, 7)
    analysis: Any = jax.jit(round_gptq).lower(kernel, hessian, qparams).compile().memory_analysis()
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert used < 4 * (3 * patch**2 + 8 * patch * channels)


@each_spec
def test_the_table_rounds_as_its_functions_do(spec: QuantSpec):
    kernel, hessian = problem(2, 24, 8)
    qparams = covering(kernel, hessian, spec)
    found = {name: r.round(Problem(kernel, qparams, hessian)) for name, r in ROUNDINGS.items()}
    np.testing.assert_array_equal(found["nearest"][0], round_nearest(kernel, qparams))
    np.testing.assert_array_equal(found["gptq"][0], round_gptq(kernel, hessian, qparams))
    assert all(format is qparams for _, format in found.values())
    assert [r.name for r in ROUNDINGS.values()] == list(ROUNDINGS)
    assert (MOMENTS in ROUNDINGS["gptq"].needs) and not ROUNDINGS["nearest"].needs


def test_sweeps_keep_powers_of_two_and_choose_the_best():
    spec = QuantSpec(3, scale="power_of_two")
    kernel, hessian = problem(2, 12, 40)
    format = covering(kernel, hessian, spec)
    wrong = format.scaled(jnp.float32(4))  # a start from which the scales must move
    ratio = spec.scales.nearest_ratio
    codes, swept = coordinate_sweeps(round_nearest(kernel, wrong), kernel, hessian, wrong, 3, ratio)
    assert np.all(np.frexp(np.asarray(swept.scale))[0] == 0.5)
    assert np.any(np.asarray(swept.scale) < np.asarray(wrong.scale))
    before = loss(round_nearest(kernel, wrong), kernel, hessian, wrong)
    assert loss(codes, kernel, hessian, swept) < before
