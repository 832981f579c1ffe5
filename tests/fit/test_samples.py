"""Samples: what an objective measures on them is the error of the layer."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import operations
import pytest

from qjax.fit.moments import moments
from qjax.fit.observers import observe
from qjax.fit.samples import diagonal_blocks, join_patch, kernel_loss, split_patch

RNG = np.random.default_rng(0)
KERNEL: Any = RNG.standard_t(4, (2, 10, 6)).astype(np.float32)


@pytest.mark.parametrize("case", operations.CASES, ids=lambda case: case.id)
def test_the_weight_objective_is_the_mean_squared_error_of_the_output(case: operations.Case):
    operation, x, kernel = case.operation, case.x, case.kernel
    kernel_hat: Any = np.round(np.asarray(kernel) * 2) / 2
    y, y_hat = (operations.apply(operation, x, k) for k in (kernel, jnp.asarray(kernel_hat)))
    error = operations.by_channel(operation, np.asarray(y_hat, np.float64) - np.asarray(y))
    hessian = observe(moments(operation), [x]).hessian
    loss = kernel_loss(operation.to_matrix(kernel_hat - np.asarray(kernel)), hessian)
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
    np.testing.assert_array_equal(diagonal_blocks(jnp.asarray(hessian), groups), expected)


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_join_patch_inverts_split_patch(groups: int):
    blocks = split_patch(jnp.asarray(KERNEL), groups)
    assert blocks.shape == (2, groups, -(-10 // groups), 6)
    np.testing.assert_array_equal(join_patch(blocks, 10), KERNEL)
