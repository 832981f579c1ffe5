"""Moments of patches: however the values are split, and against NumPy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from qjax.fit.moments import CrossMoments, Moments, centered, cross_moments, map_groups, moments
from qjax.fit.observers import Observer, observe, observe_stacked
from qjax.graph.operation import output_matrix
from qjax.rounding.metric import damped

SHAPE = (8, 5)  # all the values of a property's example
SPLITS = ((8,), (3, 5), (2, 2, 4))  # few, so that each observer compiles for few shapes
LOW, HIGH = -2.0, 3.0
MATRIX = next(case.operation for case in operations.CASES if case.id == "dot_rhs")
CHANNELS = MATRIX.matrix_shape[2]

values = st_numpy.arrays(np.float32, SHAPE, elements=st.floats(LOW, HIGH, width=32))


def split(x: np.ndarray, sizes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(part) for part in np.split(x, np.cumsum(sizes)[:-1])]


def moments_of(x: np.ndarray) -> Moments:
    return Moments(jnp.asarray(x.mean(0)[None]), jnp.asarray((x.T @ x)[None] / len(x)))


def cross_moments_of(x: np.ndarray) -> CrossMoments:
    """Of MATRIX's input and, as the residual of its output, the first channels of that input."""
    r = x[:, :CHANNELS]
    return CrossMoments(jnp.asarray(r.mean(0)[None]), jnp.asarray((x.T @ r)[None] / len(x)))


def cross_moments_of_inputs() -> Observer:
    """`cross_moments` as an observer of the input alone."""
    observer = cross_moments(MATRIX, 1, lambda patches: patches[:, :CHANNELS])

    def update(state: Any, x: jax.Array) -> Any:
        return observer.update(state, (x, ()))

    return observer._replace(update=update)


class Case(NamedTuple):
    """An observer and what its statistic is, in NumPy."""

    id: str
    observer: Observer
    reference: Callable[[np.ndarray], Any]


CASES = (
    Case("moments", moments(MATRIX), moments_of),
    Case("cross_moments", cross_moments_of_inputs(), cross_moments_of),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@hypothesis.given(values)
def test_split_batches_equal_one_batch(case: Case, x: np.ndarray):
    for sizes in SPLITS:
        statistic = observe(case.observer, split(x, sizes))
        chex.assert_trees_all_close(statistic, case.reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@hypothesis.given(values)
def test_stacked_batches_equal_a_list_of_them(case: Case, x: np.ndarray):
    for count in (1, 2, 4):
        stacked = jnp.asarray(x).reshape(count, -1, SHAPE[1])
        chex.assert_trees_all_close(
            observe_stacked(case.observer, stacked), case.reference(x), rtol=1e-5, atol=1e-5
        )


def given_moments(operation: Any, stride: int) -> Observer:
    """`cross_moments` of a residual that is known."""
    return cross_moments(operation, stride, lambda _, residual: residual)


def given(case: operations.Case, residual: jax.Array, stride: int) -> Any:
    by_group = output_matrix(case.operation, residual)[::stride].swapaxes(0, 1)
    return case.x, (by_group,)


@pytest.mark.parametrize("case", operations.CASES, ids=lambda case: case.id)
def test_moments_are_those_of_the_patches_and_of_the_residual(case: operations.Case):
    operation = case.operation
    residual = operations.apply(operation, case.x, case.kernel)
    mean, hessian = observe(moments(operation), [case.x])
    residual_mean, cross = observe(given_moments(operation, 1), [given(case, residual, 1)])
    x = np.asarray(operations.patches(operation, case.x), np.float64)
    r = operations.by_channel(operation, residual).astype(np.float64)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(mean, x.mean(0))
    close(hessian, np.einsum("pgk,pgl->gkl", x, x) / len(x))
    close(residual_mean, r.mean(0))
    close(cross, np.einsum("pgk,pgm->gkm", x, r) / len(x))
    last_bits = 4 * np.finfo(np.float32).eps * np.abs(hessian).max()  # as a processor sums
    np.testing.assert_allclose(hessian, np.swapaxes(hessian, 1, 2), rtol=0, atol=last_bits)


@pytest.mark.parametrize(
    "case",
    [case for case in operations.CASES if case.id in ("grouped", "mixed_layout", "dot_two_axes")],
    ids=lambda case: case.id,
)
def test_moments_of_every_third_patch(case: operations.Case):
    operation = case.operation
    residual = operations.apply(operation, case.x, case.kernel)
    x = np.asarray(operations.patches(operation, case.x), np.float64)[::3]
    r = operations.by_channel(operation, residual).astype(np.float64)[::3]
    mean, hessian = observe(moments(operation, 3), [case.x])
    _, cross = observe(given_moments(operation, 3), [given(case, residual, 3)])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(mean, x.mean(0))
    close(hessian, np.einsum("pgk,pgl->gkl", x, x) / len(x))
    close(cross, np.einsum("pgk,pgm->gkm", x, r) / len(x))


def test_other_devices_take_all_groups_together(monkeypatch: pytest.MonkeyPatch):
    [case] = [case for case in operations.CASES if case.id == "grouped"]

    def squares(patches: jax.Array, factor: jax.Array) -> jax.Array:
        return factor * patches.T @ patches

    groups = case.operation.matrix_shape[0]
    given = (squares, case.operation, case.x, (jnp.arange(1.0, groups + 1),), 2)
    count, expected = map_groups(*given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert map_groups(*given)[0] == count
    chex.assert_trees_all_close(map_groups(*given)[1], expected, rtol=1e-5, atol=1e-5)


@hypothesis.given(values, st.permutations(range(SHAPE[1])))
def test_permuting_channels_commutes_with_moments(x: np.ndarray, order: list[int]):
    found, permuted = (observe(moments(MATRIX), [jnp.asarray(part)]) for part in (x, x[:, order]))
    np.testing.assert_allclose(permuted.mean, np.asarray(found.mean)[:, order], rtol=1e-5)
    expected = np.asarray(found.hessian)[:, order][:, :, order]
    np.testing.assert_allclose(permuted.hessian, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("observer", [case.observer for case in CASES])
def test_bfloat16_batches_are_accumulated_in_float32(observer: Observer):
    x = jnp.linspace(LOW, HIGH, 40, dtype=jnp.bfloat16).reshape(SHAPE)
    statistic = observe(observer, [x])
    chex.assert_trees_all_close(statistic, observe(observer, [x.astype(jnp.float32)]))
    assert {leaf.dtype for leaf in jax.tree.leaves(statistic)} == {jnp.dtype("float32")}


@hypothesis.given(values)
def test_centered_moments_are_the_covariance(x: np.ndarray):
    found = centered(observe(moments(MATRIX), [jnp.asarray(x)]))
    np.testing.assert_allclose(found.mean[0], x.mean(0), rtol=1e-5, atol=1e-5)
    expected = np.cov(x.T.astype(np.float64), bias=True)
    np.testing.assert_allclose(found.hessian[0], expected, rtol=1e-4, atol=1e-4)


def test_a_covariance_is_positive_where_means_are_large():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.uniform(1, 2, (1, 192)) + 1e-3 * rng.normal(size=(128, 192)))
    mean = x.mean(0)
    raw = Moments(mean[None], (x.T @ x / len(x))[None])
    difference = np.float64(raw.hessian[0] - jnp.outer(mean, mean))
    assert np.linalg.eigvalsh(difference).min() < -1e-6  # what float32 leaves of it
    found = centered(raw)
    assert np.linalg.eigvalsh(np.float64(damped(found.hessian[0]))).min() > 0


def test_a_covariance_of_usual_inputs_is_left_alone():
    x = jnp.float32(np.maximum(np.random.default_rng(0).normal(size=(500, 64)), 0))
    mean = x.mean(0)
    raw = Moments(mean[None], (x.T @ x / len(x))[None])
    np.testing.assert_array_equal(centered(raw).hessian[0], raw.hessian[0] - jnp.outer(mean, mean))
