"""Least squares judged on images held out: against NumPy, and what it changes where few are."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest

import qjax
from qjax.fit.held_out import (
    FEW_IMAGES,
    FOLDS,
    SHRINKAGES,
    choose_shrinkage,
    held_out_errors,
    joint_moments,
)
from qjax.rounding.metric import DAMPING

CASE = next(case for case in operations.CASES if case.id == "grouped")
OPERATION = CASE.operation
RNG = np.random.default_rng(0)
OUTPUT = operations.apply(OPERATION, CASE.x, CASE.kernel).shape[1:]
X: Any = RNG.normal(size=(1, 4 * FOLDS, *CASE.x.shape[1:])).astype(np.float32)
R: Any = RNG.normal(size=(1, 4 * FOLDS, *OUTPUT)).astype(np.float32)


def expected_error(x: np.ndarray, r: np.ndarray, extra: float | None, has_free_bias: bool) -> float:
    """The sum over folds of the mean squared error that a fit to the other folds leaves."""
    inputs = [np.asarray(operations.patches(OPERATION, part)) for part in np.split(x[0], FOLDS)]
    missing = [operations.by_channel(OPERATION, part) for part in np.split(r[0], FOLDS)]
    total = 0.0
    for k in range(FOLDS):
        seen, target = (
            np.concatenate(parts[:k] + parts[k + 1 :]).astype(np.float64)
            for parts in (inputs, missing)
        )
        means = (seen.mean(0), target.mean(0)) if has_free_bias else (0.0, 0.0)
        for group in range(seen.shape[1]):
            a, b = ((v - m)[:, group] for v, m in zip((seen, target), means, strict=True))
            hessian = a.T @ a / len(a)
            for added in (extra or 0.0, DAMPING):
                hessian += added * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
            shift = np.linalg.solve(hessian, a.T @ b / len(a)) * (extra is not None)
            own, lacking = inputs[k] - means[0], missing[k] - means[1]
            total += ((lacking[:, group] - own[:, group] @ shift) ** 2).sum() / len(own)
    return total


def errors_of(x: Any, r: Any, has_free_bias: bool) -> tuple[jax.Array, jax.Array]:
    parts = [joint_moments(OPERATION, 1, batch) for batch in zip(x, r, strict=True)]
    joint = jax.tree.map(lambda *each: sum(each) / len(each), *parts)
    return held_out_errors(joint, has_free_bias)


@pytest.mark.parametrize("has_free_bias", [True, False])
def test_errors_are_those_of_fits_to_the_other_folds(has_free_bias: bool):
    errors, before = errors_of(X, R + 0.5, has_free_bias)
    expected = [expected_error(X, R + 0.5, extra, has_free_bias) for extra in (*SHRINKAGES, None)]
    np.testing.assert_allclose([*errors, before], expected, rtol=1e-3)


def test_what_a_kernel_explains_is_not_shrunk():
    residual = operations.apply(OPERATION, X[0], CASE.kernel)[None]
    extra, overfit = choose_shrinkage(OPERATION, X, residual, True)
    assert extra == 0 and overfit < 0.01


def test_noise_is_shrunk_and_a_fit_to_it_is_worse_than_none():
    extra, overfit = choose_shrinkage(OPERATION, X[:, :4], R[:, :4], True)
    assert extra >= 10 and overfit > 1


def test_folds_of_batches_are_joined():
    halves = X.reshape(2, -1, *X.shape[2:]), R.reshape(2, -1, *R.shape[2:])
    folds = [np.concatenate(np.split(a, FOLDS, axis=1), axis=0) for a in halves]
    in_order = [a.reshape(FOLDS, 2, *a.shape[1:]).reshape(1, -1, *a.shape[2:]) for a in folds]
    errors = [errors_of(x, r, True)[0] for x, r in (halves, in_order)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-4)


def test_of_a_single_patch_nothing_can_be_held_out():
    matrix = next(case for case in operations.CASES if case.id == "dot_rhs")
    x, kernel = matrix.x[:1], matrix.kernel
    residual = operations.apply(matrix.operation, x, kernel)
    extra, overfit = choose_shrinkage(matrix.operation, x[None], residual[None], True)
    assert extra == SHRINKAGES[-1] and overfit == np.inf


@pytest.mark.parametrize("case", operations.CASES, ids=lambda case: case.id)
def test_every_operation_can_be_judged(case: operations.Case):
    y = operations.apply(case.operation, case.x, case.kernel)
    extra, overfit = choose_shrinkage(case.operation, case.x[None], y[None], False)
    assert float(extra) in np.array(SHRINKAGES, np.float32) and overfit < 1


# ---- In a network

SIZES = (24, 40, 40, 8)
KERNELS = {
    f"fc{i}": (RNG.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
    for i, shape in enumerate(zip(SIZES, SIZES[1:], strict=False))
}
DIRECTIONS = RNG.normal(size=(SIZES[0], SIZES[0])) * np.geomspace(1, 0.1, SIZES[0])
IMAGES = (RNG.normal(size=(2 * FEW_IMAGES, SIZES[0])) @ DIRECTIONS.T).astype(np.float32)
RECIPE = qjax.recipe(4, grid_size=8)


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    for kernel in params.values():
        x = jax.nn.relu(x @ kernel)
    return x


def error(q: qjax.Quantized) -> float:
    wanted = apply_fn(KERNELS, jnp.asarray(IMAGES[FEW_IMAGES:]))
    return float(jnp.mean((q.apply_fn(q.params, IMAGES[FEW_IMAGES:]) - wanted) ** 2))


def test_few_images_name_the_layers_and_the_remedy(caplog: pytest.LogCaptureFixture):
    qjax.quantize(apply_fn, KERNELS, IMAGES[:12], RECIPE)
    [record] = caplog.records
    assert "'fc1'" in record.getMessage() and "in 3 of 3 layers" in record.getMessage()
    assert f"Pass at least {FEW_IMAGES} images" in record.getMessage()


@pytest.mark.parametrize(
    ("count", "recipe"),
    [(FEW_IMAGES, RECIPE), (12, dataclasses.replace(RECIPE, reconstructions=0))],
)
def test_enough_images_and_no_fits_are_not_warned_of(
    count: int, recipe: qjax.Recipe, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        qjax.quantize(apply_fn, KERNELS, IMAGES[:count], recipe)
    assert not caplog.records


def test_shrunk_fits_do_better_on_other_images(monkeypatch: pytest.MonkeyPatch):
    shrunk = error(qjax.quantize(apply_fn, KERNELS, IMAGES[:12], RECIPE))
    monkeypatch.setattr("qjax.calibration.FEW_IMAGES", 0)
    assert shrunk < 0.9 * error(qjax.quantize(apply_fn, KERNELS, IMAGES[:12], RECIPE))


def test_many_images_are_fitted_as_before(monkeypatch: pytest.MonkeyPatch):
    plain = qjax.quantize(apply_fn, KERNELS, IMAGES[:FEW_IMAGES], RECIPE)
    monkeypatch.setattr("qjax.calibration.FEW_IMAGES", 0)
    same = qjax.quantize(apply_fn, KERNELS, IMAGES[:FEW_IMAGES], RECIPE)
    for one, other in zip(jax.tree.leaves(plain.params), jax.tree.leaves(same.params), strict=True):
        np.testing.assert_array_equal(one, other)
