"""Least squares for what the activation shows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest

from qjax.fit.moments import centered, moments
from qjax.fit.observers import observe
from qjax.fit.refit import Goal, by_group, lacking, refit, residual_moments
from qjax.graph.activation import NONE, RELU, RELU6, Activation
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.operation import output_matrix

RNG = np.random.default_rng(0)
CASE = next(case for case in operations.CASES if case.id == "grouped")
OPERATION = CASE.operation
FOLDED = Folded(
    OPERATION.to_matrix(CASE.kernel),
    jnp.zeros(OPERATION.matrix_shape[0] * OPERATION.matrix_shape[2]),
)
X: Any = RNG.normal(size=(16, *CASE.x.shape[1:])).astype(np.float32)
X_HAT: Any = X + RNG.normal(size=X.shape).astype(np.float32)
TARGET = apply_folded(OPERATION, FOLDED, X)
PLAIN = observe(moments(OPERATION), [X_HAT])
MOMENTS = centered(jax.tree.map(jnp.copy, PLAIN))


def error_shown(goal: Goal, folded: Folded) -> float:
    z_hat = apply_folded(OPERATION, folded, X_HAT)
    added = 0.0 if goal.shortcut is None else goal.shortcut[0]
    act = goal.activation.function
    shown = act(TARGET + added) - act(z_hat + added)
    return float(jnp.mean(jnp.square(shown)))


def goal(activation: Activation, shortcut: Any = None) -> Goal:
    return Goal(TARGET[None], None if shortcut is None else shortcut[None], activation)


def refitted(wanted: Goal, steps: int, has_free_bias: bool = True) -> Folded:
    seen = MOMENTS if has_free_bias else PLAIN
    return refit(OPERATION, FOLDED, seen, X_HAT[None], wanted, 1, has_free_bias, steps)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("name", ["grouped", "mixed_layout", "dot_two_axes"])
def test_the_residual_is_that_of_the_whole_output(name: str, stride: int):
    [case] = [case for case in operations.CASES if case.id == name]
    operation = case.operation
    groups, _, channels = operation.matrix_shape
    bias = jnp.linspace(-1, 1, groups * channels)
    folded = Folded(operation.to_matrix(case.kernel).astype(jnp.float32), bias)
    output = apply_folded(operation, folded, case.x)
    wanted = Goal(output + 0.5, -output, RELU)
    parts = by_group(operation, folded, wanted, stride)
    found = observe(residual_moments(operation, stride, RELU), [(case.x, parts)])
    expected = output_matrix(operation, lacking(wanted, output))[::stride]
    patches = operations.patches(operation, case.x)[::stride]
    cross = np.einsum("pgk,pgm->gkm", patches, expected) / len(patches)
    np.testing.assert_allclose(found.residual_mean, expected.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.cross, cross, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (NONE, [-1.0, 1.0, 4.0, -3.0]),
        (RELU, [0.0, 1.0, 4.0, -1.0]),
        (RELU6, [0.0, 1.0, 4.0, -1.0]),
    ],
)
def test_what_a_relu_hides_is_not_lacking(activation: Activation, expected: list[float]):
    target, output = jnp.array([-2.0, 2.0, 2.0, -2.0]), jnp.array([-1.0, 1.0, -2.0, 1.0])
    found = lacking(Goal(target, None, activation), output)
    np.testing.assert_array_equal(found, expected)


def test_beyond_six_a_relu6_hides():
    target, output = jnp.array([7.0, 7.0, 5.0]), jnp.array([9.0, 4.0, 8.0])
    found = lacking(Goal(target, None, RELU6), output)
    np.testing.assert_array_equal(found, [0.0, 2.0, -3.0])


def test_the_shortcut_counts():
    target, output, shortcut = jnp.array([1.0, 1.0]), jnp.array([3.0, 3.0]), jnp.array([-4.0, 1.0])
    found = lacking(Goal(target, shortcut, RELU), output)
    np.testing.assert_array_equal(found, [0.0, -2.0])


def test_without_an_activation_one_step_is_the_regression_on_the_patches():
    patches = np.asarray(operations.patches(OPERATION, X_HAT), np.float64)
    target = operations.by_channel(OPERATION, TARGET).astype(np.float64)
    found = refitted(goal(NONE), 1)
    bias = np.asarray(found.bias).reshape(target.shape[1:])
    for group in range(patches.shape[1]):
        rows = np.concatenate([patches[:, group], np.ones((len(patches), 1))], axis=1)
        solution, *_ = np.linalg.lstsq(rows, target[:, group], rcond=None)
        np.testing.assert_allclose(found.kernel[group], solution[:-1], atol=0.03)  # it is damped
        np.testing.assert_allclose(bias[group], solution[-1], atol=0.03)


@pytest.mark.parametrize("shortcut", [None, 0.5 * TARGET - 0.5])
def test_every_step_lowers_the_error_that_a_relu_shows(shortcut: Any):
    wanted = goal(RELU, shortcut)
    errors = [error_shown(wanted, refitted(wanted, steps)) for steps in range(4)]
    assert errors[3] < errors[2] < errors[1] < errors[0]
    hidden_too = refitted(goal(NONE, shortcut), 1)
    assert errors[3] < error_shown(wanted, hidden_too)


def test_a_bias_that_is_not_free_stays():
    found = refitted(goal(RELU), 1, has_free_bias=False)
    np.testing.assert_array_equal(found.bias, FOLDED.bias)
    assert error_shown(goal(RELU), found) < error_shown(goal(RELU), FOLDED)
