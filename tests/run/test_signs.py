"""Layers whose inputs are signs, against loops in NumPy, in float and by population count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.formats.binary import Binary, Signs
from qjax.graph.layers import find_layers
from qjax.run.layer import QuantizedLayer, apply_linear
from qjax.run.signs import center, count_signs, pack_signs, sum_of_signs

RNG = np.random.default_rng(0)


def convolution(strides: Any = (1, 1), padding: Any = "SAME", groups: int = 1) -> Any:
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            params["w"],
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return apply_fn


def dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


CASES = {
    "dense": (dense, (70, 5), (3, 70)),
    "conv": (convolution(), (3, 3, 6, 4), (2, 5, 5, 6)),
    "strided": (convolution((2, 2), ((2, 0), (1, 1))), (3, 2, 4, 3), (2, 6, 5, 4)),
    "grouped": (convolution(groups=2), (3, 3, 2, 6), (2, 5, 5, 4)),
    "depthwise": (convolution(groups=4), (3, 3, 1, 8), (1, 4, 4, 4)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    """(operation, layer, input) of one of the cases."""
    apply_fn, kernel_shape, x_shape = CASES[request.param]
    params = {"w": jnp.asarray(RNG.normal(size=kernel_shape), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=x_shape) + 0.5, jnp.float32)
    operation = find_layers(apply_fn, params, x).sites[0].layer.operation
    groups, patch, channels = operation.matrix_shape
    codes = jnp.where(operation.to_matrix(params["w"]) >= 0, 1, -1).astype(jnp.int8)
    scale = jnp.asarray(RNG.uniform(0.5, 2, size=(groups, 1, channels)), jnp.float32)
    weights = Binary(scale, jnp.zeros_like(scale, jnp.int32), -1, 1)
    bias = jnp.asarray(RNG.normal(size=groups * channels), jnp.float32)
    shift = jnp.asarray(RNG.normal(size=(*[1] * (x.ndim - 1), x.shape[-1])) / 2, jnp.float32)
    return operation, QuantizedLayer(codes, bias, weights, Signs(shift), None, None), x


def test_a_layer_is_signs_times_the_mean_magnitude_of_the_patch(case: Any):
    operation, layer, x = case
    left, padded = operation.padded(x, jnp.zeros(()))
    patches = np.asarray(left.patches(padded - layer.inputs.shift), np.float64)
    products = np.einsum("pgk,gkm->pgm", np.where(patches >= 0, 1, -1), layer.kernel)
    expected = products * np.asarray(layer.weights.scale)[:, 0]
    expected = expected * np.abs(patches).mean(-1, keepdims=True)
    expected = expected + np.asarray(layer.bias).reshape(expected.shape[1:])
    found = np.asarray(apply_linear(operation, layer, x))
    order = operation.output_order(found.ndim)
    np.testing.assert_allclose(
        found.transpose(order).reshape(expected.shape), expected, rtol=1e-5, atol=1e-5
    )


def test_counting_bits_gives_the_sum_of_signs_and_the_same_output_bit_for_bit(case: Any):
    operation, layer, x = case
    left, centered = center(operation, layer.inputs, x)
    counted = count_signs(left, layer.kernel, centered)
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(counted, sum_of_signs(left, layer.kernel, centered))
    run = jax.jit(apply_linear, static_argnums=(0, 3))
    np.testing.assert_array_equal(
        run(operation, layer, x, count_signs), run(operation, layer, x, sum_of_signs)
    )


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_signs_are_packed_thirty_two_to_a_word(size: int):
    x = RNG.normal(size=(3, size)).astype(np.float32)
    words = np.asarray(pack_signs(jnp.asarray(x)))
    assert words.shape == (3, -(-size // 32)) and words.dtype == np.uint32
    for row, packed in zip(x, words, strict=True):
        number = sum(int(word) << 32 * i for i, word in enumerate(packed))
        assert [(number >> i) & 1 for i in range(size)] == [int(v >= 0) for v in row]


def test_a_shift_takes_the_mean_away():
    x = jnp.array([[1.0, 3.0], [1.5, 2.0]])
    operation = find_layers(dense, {"w": jnp.ones((2, 1))}, x).sites[0].layer.operation
    layer = QuantizedLayer(
        jnp.ones((1, 2, 1), jnp.int8),
        jnp.zeros(1),
        Binary(jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1), jnp.int32), -1, 1),
        Signs(jnp.array([[1.25, 2.5]])),
        None,
        None,
    )
    # x − t = [−.25, .5], [.25, −.5]: signs cancel, K = 0.375
    np.testing.assert_array_equal(apply_linear(operation, layer, x), [[0.0], [0.0]])
    shifted = dataclasses.replace(layer, inputs=Signs(jnp.array([[0.5, 0.5]])))
    np.testing.assert_array_equal(apply_linear(operation, shifted, x), [[3.0], [2.5]])


def test_the_report_counts_a_bit_per_weight_and_its_shifts():
    params = {"w": jnp.asarray(RNG.normal(size=(64, 16)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(32, 64)), jnp.float32)
    f, trainable = qjax.qat.prepare(dense, params, x, "xnor", qjax.recipe(1, outputs=None))
    q = qjax.qat.finish(f, trainable, x)
    [record] = q.report
    # codes, a scale and a zero point per channel, shifts per input, biases
    assert record.bytes_quantized == 64 * 16 // 8 + 16 * 8 + 64 * 4 + 16 * 4
    assert not record.has_dynamic_input and "1/1/–" in str(q.report)
    assert qjax.cost(q)[0].bit_operations == 64 * 16
