"""Codebooks fitted by k-means: Lloyd's iteration, and least squares for the codes found."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QuantSpec
from qjax.fit.samples import KernelSample
from qjax.formats.kmeans import KMeans, lloyd, refit, starting_levels

RNG = np.random.default_rng(0)


def start(shape: tuple[int, ...], bits: int) -> np.ndarray:
    return np.broadcast_to(2 * starting_levels(QuantSpec(bits)), (*shape, 2**bits)).copy()


def lloyd_in_numpy(values: Any, weights: Any, levels: np.ndarray, rounds: int) -> np.ndarray:
    """Of one table: float64."""
    for _ in range(rounds):
        at = np.abs(values[:, None] - levels[None]).argmin(1)
        for code in range(len(levels)):
            if weights[at == code].sum() > 0:
                levels[code] = np.average(values[at == code], weights=weights[at == code])
    return levels


def error(values: Any, weights: Any, format: KMeans) -> float:
    rounded = np.asarray(format.project(jnp.asarray(values)), np.float64)
    return float(np.sum(np.asarray(weights, np.float64) * (rounded - values) ** 2))


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_lloyd_is_the_numpy_reference(bits: int):
    values = RNG.normal(size=(2, 1, 90, 3)).astype(np.float32)
    weights = RNG.uniform(size=(2, 1, 90, 1)).astype(np.float32)
    found = lloyd(jnp.asarray(values), jnp.asarray(weights), KMeans(start((2, 1, 3), bits)), 7)
    for g, c in np.ndindex(2, 3):
        expected = lloyd_in_numpy(
            np.float64(values[g, 0, :, c]), weights[g, 0, :, 0], start((), bits).astype(float), 7
        )
        np.testing.assert_allclose(found.levels[g, 0, c], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4)])
def test_no_round_makes_the_error_greater(shape: tuple[int, ...]):
    values = jnp.asarray(RNG.standard_t(3, size=(2, 3, 40, 4)), jnp.float32)
    weights = jnp.asarray(RNG.uniform(size=(2, 3, 40, 1)), jnp.float32)
    format = KMeans(jnp.asarray(start(shape, 3)))

    def at(format: KMeans) -> float:
        return error(values, weights, KMeans(format.levels[:, :, None]))

    run = jax.jit(lloyd)
    errors = [at(run(values, weights, format, rounds)) for rounds in range(9)]
    assert errors[0] == at(format) and errors[-1] < 0.8 * errors[0]
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])


def test_weights_draw_the_levels():
    values = jnp.array([-1.0, 0.0, 1.0, 1.1, 1.2, 3.0]).reshape(1, 1, 6, 1)
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, 100.0, 1.0]).reshape(1, 1, 6, 1)
    levels = jnp.array([-1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 4)
    found = lloyd(values, weights, KMeans(levels)).levels.ravel()
    np.testing.assert_allclose(found, [-1, 0, (1.0 + 1.1 + 120) / 102, 3], rtol=1e-6)


@pytest.mark.parametrize("values", [[0.0] * 5, [1.5] * 5, [-2.0, 0.5, 0.5, 0.5, -2.0]])
def test_fewer_values_than_levels_are_exact(values: list[float]):
    kernel = jnp.array(values).reshape(1, 5, 1)
    spec = QuantSpec(3, format="kmeans")
    sample = KernelSample(kernel, spec)
    low, high = sample.extremes()
    format = lloyd(sample.values, sample.importance, KMeans(spec.cover(low, high).levels[:, :, 0]))
    assert bool(jnp.all(jnp.isfinite(format.levels)) and jnp.all(format.step > 0))
    np.testing.assert_array_equal(format.project(kernel), kernel)


def moments(size: int) -> np.ndarray:
    x = RNG.normal(size=(3 * size, size)) @ RNG.normal(size=(size, size))
    return (x.T @ x / (3 * size)).astype(np.float32)


@pytest.mark.parametrize(("blocks", "shares"), [(1, False), (3, False), (1, True)])
def test_the_refit_is_least_squares_for_the_codes(blocks: int, shares: bool):
    """Against NumPy's solution for every table, or for the one that the channels share."""
    kernel = RNG.normal(size=(1, 22, 4)).astype(np.float32)
    metric = moments(22)[None]
    levels = np.sort(RNG.normal(size=(1, blocks, 1 if shares else 4, 4)).astype(np.float32))
    size = -(-22 // blocks)
    wide = KMeans(jnp.asarray(np.repeat(levels, size, 1)[:, :22] if blocks > 1 else levels))
    codes = np.asarray(wide.encode(jnp.asarray(kernel)))[0]
    values = wide.decode(jnp.asarray(codes)[None])
    passes = [(values, KMeans(jnp.asarray(levels)))]
    run = jax.jit(refit)
    for _ in range(60):
        before, format = passes[-1]
        passes.append(run(before, jnp.asarray(kernel), jnp.asarray(metric), format))

    def loss(values: Any) -> float:
        e = np.asarray(values, np.float64)[0] - kernel[0]
        return float(np.sum(e * (metric[0] @ e)))

    losses = [loss(values) for values, _ in passes]
    assert np.all(np.diff(losses) <= 1e-4 * losses[0])
    factor = np.linalg.cholesky(np.float64(metric[0])).T
    one_hot = np.eye(blocks * 4)[codes + 4 * (np.arange(22) // size)[:, None]]
    systems = [(factor @ one_hot[:, c], factor @ kernel[0, :, c]) for c in range(4)]
    if shares:
        systems = [tuple(np.concatenate(parts) for parts in zip(*systems, strict=True))]
    best = sum(np.sum((a @ np.linalg.lstsq(a, b)[0] - b) ** 2) for a, b in systems)
    np.testing.assert_allclose(losses[-1], best, rtol=0.01)
    if blocks == 1:
        np.testing.assert_allclose(losses[1], best, rtol=0.05)


def test_second_moments_make_it_better_than_without_and_than_uniform_codes():
    scales = np.geomspace(0.05, 3, 24)
    x = jnp.asarray(RNG.normal(size=(256, 24)) * scales, jnp.float32)
    params = {"w": jnp.asarray(RNG.normal(size=(24, 8)), jnp.float32)}
    plain: dict[str, Any] = {"inputs": None, "outputs": None, "rounding": "nearest"}
    plain |= {"sweeps": 0, "reconstructions": 0}

    def output_db(format: str, **fields: Any) -> float:
        recipe = qjax.recipe(8, weight_bits=3, weight_format=format, **plain | fields)
        q = qjax.quantize(lambda p, x: x @ p["w"], params, x, recipe)
        return q.report[0].output_sqnr_db

    with_moments = output_db("kmeans")
    assert with_moments > output_db("kmeans", range_method="mse") + 1
    assert with_moments > output_db("uniform") + 1
