"""A layer's operation as a product of matrices: one law for every way of writing it."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from operations import by_channel

from qjax.graph.operation import along_channels, from_channels_last

each_operation = pytest.mark.parametrize("case", operations.CASES, ids=lambda case: case.id)


@each_operation
def test_reads_the_operation_of_an_equation(case: operations.Case):
    operation = case.operation
    groups, _, channels = case.matrix_shape
    assert operation.kind == case.kind
    assert operation.kernel_shape == case.kernel_shape
    assert operation.matrix_shape == case.matrix_shape
    assert math.prod(operation.channel_sizes) == groups * channels
    assert hash(operation) == hash(case.operation) and operation == case.operation


@each_operation
def test_patches_times_matrix_is_the_operation(case: operations.Case):
    operation, x, kernel = case.operation, case.x, case.kernel
    y = operations.apply(operation, x, kernel)
    expected = case.function(*((kernel, x) if case.kernel_is_lhs else (x, kernel)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(operation.evaluate(x, kernel), expected, rtol=1e-5, atol=1e-5)
    matrix = operation.to_matrix(kernel)
    product = np.einsum("pgk,gkm->pgm", operations.patches(operation, x), matrix)
    np.testing.assert_allclose(product, by_channel(operation, y), rtol=1e-5, atol=1e-5)


@each_operation
def test_from_matrix_inverts_to_matrix(case: operations.Case):
    operation, kernel = case.operation, case.kernel
    matrix = operation.to_matrix(kernel)
    chex.assert_shape(matrix, case.matrix_shape)
    np.testing.assert_array_equal(operation.from_matrix(matrix), kernel)
    groups, patch, channels = case.matrix_shape
    numbered = jnp.arange(groups * patch * channels).reshape(case.matrix_shape)
    np.testing.assert_array_equal(operation.to_matrix(operation.from_matrix(numbered)), numbered)


@each_operation
def test_along_channels_broadcasts_against_the_output(case: operations.Case):
    operation = case.operation
    groups, _, channels = case.matrix_shape
    vector = jnp.arange(groups * channels, dtype=jnp.float32)
    operands = (case.kernel, case.x) if case.kernel_is_lhs else (case.x, case.kernel)
    shape = jax.eval_shape(case.function, *operands).shape
    spread = np.broadcast_to(along_channels(operation, vector, len(shape)), shape)
    rows = by_channel(operation, spread)
    np.testing.assert_array_equal(rows, np.broadcast_to(vector.reshape(groups, -1), rows.shape))


@each_operation
def test_channels_last_is_the_same_operation(case: operations.Case):
    operation, last = case.operation, case.operation.channels_last
    kernel = last.from_matrix(operation.to_matrix(case.kernel))
    x = case.x.transpose(operation.input_order(case.x.ndim))
    y = from_channels_last(operation, last.apply(x, kernel))
    np.testing.assert_allclose(y, operation.apply(case.x, case.kernel), rtol=1e-5, atol=1e-4)
    assert last.is_product or last.ends_with_channels
    assert last.channels_last == last
