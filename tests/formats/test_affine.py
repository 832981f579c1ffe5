"""Affine quantization of plain arrays: its laws, and a NumPy reference."""

import dataclasses
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import qjax
from qjax import QParams, QuantSpec
from qjax.formats.affine import affine_qparams

SHAPE = (6, 4)  # one shape for all examples, so that each operation compiles once
EPS = float(np.finfo(np.float32).eps)

SPECS = st.builds(QuantSpec, st.sampled_from([2, 3, 4, 8, 11, 16]), st.booleans())
SCALES = st.sampled_from([1e-20, 1e-3, 1.0, 37.0, 1e20])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of SHAPE: zeros, repeated values, one-sided channels, very small and very large."""
    elements = st.floats(-1, 1, width=32, allow_subnormal=False)
    values = draw(st_numpy.arrays(np.float32, SHAPE, elements=elements))
    offset = draw(st.sampled_from([-1.0, 0.0, 0.0, 1.0]))
    return (values + np.float32(offset)) * np.float32(draw(SCALES))


def fitted(x: Any, spec: QuantSpec) -> QParams:
    """Qparams per column that cover the extremes."""
    return affine_qparams(x.min(0, keepdims=True), x.max(0, keepdims=True), spec)


def width(x: Any) -> np.ndarray:
    """The width of the range per column, zero included."""
    return np.maximum(x.max(0, keepdims=True), 0) - np.minimum(x.min(0, keepdims=True), 0)


@hypothesis.given(arrays(), SPECS)
def test_error_is_at_most_half_a_scale_inside_the_range(x: Any, spec: QuantSpec):
    qparams = fitted(x, spec)
    error = np.abs(np.asarray(qjax.fake_quant(x, qparams)) - x)
    assert np.all(error <= np.asarray(qparams.scale) / 2 + 4 * EPS * width(x))


@hypothesis.given(arrays(), SPECS)
def test_zero_is_exact(x: Any, spec: QuantSpec):
    qparams = fitted(x, spec)
    zeros: Any = np.zeros(SHAPE, np.float32)
    codes = qjax.quantize_array(zeros, qparams)
    np.testing.assert_array_equal(codes, np.broadcast_to(qparams.zero_point, SHAPE))
    np.testing.assert_array_equal(qjax.dequantize(codes, qparams), zeros)
    np.testing.assert_array_equal(qjax.fake_quant(zeros, qparams), zeros)


@hypothesis.given(arrays(), SPECS)
def test_quantizing_twice_changes_nothing(x: Any, spec: QuantSpec):
    qparams = fitted(x, spec)
    codes = qjax.quantize_array(x, qparams)
    x_hat = qjax.dequantize(codes, qparams)
    chex.assert_trees_all_equal(qjax.quantize_array(x_hat, qparams), codes, strict=True)
    chex.assert_trees_all_equal(qjax.fake_quant(x_hat, qparams), x_hat, strict=True)


@hypothesis.given(arrays(), arrays(), SPECS)
def test_codes_equal_a_numpy_reference(x: Any, other: Any, spec: QuantSpec):
    qparams = fitted(other, spec)  # most of x may lie outside of the range
    codes = qjax.quantize_array(x, qparams)
    scale, zero_point = np.asarray(qparams.scale), np.asarray(qparams.zero_point)
    with np.errstate(over="ignore"):
        expected = np.clip(np.rint(x / scale) + zero_point, spec.qmin, spec.qmax)
    assert codes.dtype == qparams.dtype
    np.testing.assert_array_equal(codes, expected)
    x_hat = scale * (expected - zero_point).astype(np.float32)
    np.testing.assert_array_equal(qjax.dequantize(codes, qparams), x_hat)
    np.testing.assert_array_equal(qjax.fake_quant(x, qparams), x_hat)


@hypothesis.given(arrays(), SPECS, st.permutations(range(SHAPE[1])))
def test_permuting_channels_commutes(x: Any, spec: QuantSpec, order: list[int]):
    codes = np.asarray(qjax.quantize_array(x, fitted(x, spec)))
    permuted = qjax.quantize_array(x[:, order], fitted(x[:, order], spec))
    np.testing.assert_array_equal(permuted, codes[:, order])


@hypothesis.given(arrays(), SPECS)
def test_order_is_kept(x: Any, spec: QuantSpec):
    x = np.sort(x, axis=0)
    assert np.all(
        np.diff(np.asarray(qjax.quantize_array(x, fitted(x, spec)), np.int64), axis=0) >= 0
    )


@hypothesis.given(arrays(), SPECS)
def test_qparams_cover_the_range(x: Any, spec: QuantSpec):
    qparams = fitted(x, spec)
    low, high = (np.asarray(bound) for bound in qparams.range)
    scale, zero_point = np.asarray(qparams.scale), np.asarray(qparams.zero_point)
    slack = scale / 2 + 4 * EPS * width(x)
    assert np.all(scale > 0) and np.all(np.isfinite(scale))
    assert np.all((spec.qmin <= zero_point) & (zero_point <= spec.qmax))
    assert np.all((low <= x.min(0) + slack) & (high >= x.max(0) - slack))
    assert np.all(low <= 0) and np.all(high >= 0)
    if spec.symmetric:
        assert not np.any(zero_point)
        np.testing.assert_array_equal(low, -high)
    else:
        assert not np.any(zero_point[x.min(0, keepdims=True) >= 0]), "unsigned from 0 on"


def test_rounding_is_half_to_even_and_clips():
    qparams = QParams(jnp.float32(0.5), jnp.int32(3), 0, 15)
    x = jnp.array([-9.0, -0.75, -0.25, 0.25, 0.75, 1.25, 5.9, 6.0, 6.3, 99.0])
    np.testing.assert_array_equal(
        qjax.quantize_array(x, qparams), [0, 1, 3, 3, 5, 5, 15, 15, 15, 15]
    )


def test_infinity_clips_to_the_ends():
    qparams = QParams(jnp.float32(1e-3), jnp.int32(0), -127, 127)
    x = jnp.array([-jnp.inf, -3e38, 3e38, jnp.inf])
    np.testing.assert_array_equal(qjax.quantize_array(x, qparams), [-127, -127, 127, 127])
    assert bool(jnp.all(jnp.isfinite(qjax.fake_quant(x, qparams))))


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_an_all_zero_channel_gets_scale_1(is_symmetric: bool):
    x: Any = np.array([[0.0, 1.0], [0.0, -2.0]], np.float32)
    qparams = fitted(x, QuantSpec(symmetric=is_symmetric))
    assert float(qparams.scale[0, 0]) == 1.0 and int(qparams.zero_point[0, 0]) == 0
    assert float(qparams.scale[0, 1]) != 1.0
    assert not np.any(np.asarray(qjax.fake_quant(x, qparams))[:, 0])


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_gradient_passes_inside_the_range_and_stops_outside(bits: int, is_symmetric: bool):
    spec = QuantSpec(bits, is_symmetric)
    qparams = affine_qparams(jnp.float32(-1), jnp.float32(1), spec)
    low, high = (float(bound) for bound in qparams.range)
    inside = np.linspace(low, high, 101)[1:-1]
    x = np.concatenate([inside, [low - 1e-3, low - 9, high + 1e-3, high + 9]]).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(3 * qjax.fake_quant(x, qparams)))(x)
    np.testing.assert_array_equal(gradient, [3.0] * 99 + [0.0] * 4)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (QuantSpec(8), "int8"),
        (QuantSpec(2, symmetric=False), "uint8"),
        (QuantSpec(8, symmetric=False), "uint8"),
        (QuantSpec(9), "int16"),
        (QuantSpec(16), "int16"),
        (QuantSpec(16, symmetric=False), "uint16"),
    ],
)
def test_codes_have_the_narrowest_type(spec: QuantSpec, dtype: str):
    qparams = affine_qparams(jnp.float32(-3), jnp.float32(5), spec)
    codes = qjax.quantize_array(jnp.array([-3.0, 0.0, 5.0]), qparams)
    assert (qparams.bits, codes.dtype) == (spec.bits, dtype)
    assert int(codes[2]) == spec.qmax


def test_a_scale_of_another_rank_is_refused():
    qparams = QParams(jnp.ones(4), jnp.zeros(4, jnp.int32), -127, 127)
    message = r"`scale` must have the rank of the data, 2, or be a scalar; got shape \(4,\)"
    for function in (qjax.quantize_array, qjax.fake_quant):
        with pytest.raises(ValueError, match=message):
            function(jnp.ones(SHAPE), qparams)
    with pytest.raises(ValueError, match=message):
        qjax.dequantize(jnp.ones(SHAPE, jnp.int8), qparams)


def test_bfloat16_stays_bfloat16():
    x = jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16)
    qparams = affine_qparams(x.min(), x.max(), QuantSpec(4))
    x_hat = qjax.fake_quant(x, qparams)
    assert x_hat.dtype == jnp.bfloat16
    reference = qjax.fake_quant(x.astype(jnp.float32), qparams)
    chex.assert_trees_all_equal(x_hat, reference.astype(jnp.bfloat16), strict=True)


def test_qparams_are_a_pytree_with_limits_that_are_arrays():
    qparams = affine_qparams(jnp.full((3,), -1.0), jnp.arange(3.0), QuantSpec(symmetric=False))
    x = jnp.linspace(-1, 2, 12).reshape(3, 4)
    per_tensor = QParams(None, None, None, None, qparams.dtype)  # pyright: ignore
    axes = dataclasses.replace(per_tensor, scale=0, zero_point=0)
    per_row = jax.vmap(qjax.fake_quant, (0, axes))(x, qparams)
    columns = jax.tree.map(lambda leaf: leaf[:, None] if leaf.ndim else leaf, qparams)
    chex.assert_trees_all_equal(per_row, jax.jit(qjax.fake_quant)(x, columns), strict=True)
    leaves, structure = jax.tree.flatten(qparams)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [
        *[((3,), "float32"), ((3,), "int32")],
        *[((), "int32")] * 2,
    ]
    assert (columns.qmin, columns.qmax) == (0, 255)
    assert structure == jax.tree.structure(dataclasses.replace(qparams, qmax=jnp.int32(15)))
    assert structure != jax.tree.structure(dataclasses.replace(qparams, dtype=jnp.uint16))


def test_widths_of_one_storage_type_share_a_program():
    x: Any = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4)
    specs = [QuantSpec(bits, symmetric) for symmetric in (True, False) for bits in (2, 5, 8, 9, 16)]
    encode = jax.jit(chex.assert_max_traces(lambda x, qparams: qparams.encode(x), n=4))
    found = [encode(x, fitted(x, spec)) for spec in specs]
    types = ["int8"] * 3 + ["int16"] * 2 + ["uint8"] * 3 + ["uint16"] * 2
    assert [codes.dtype for codes in found] == types
    assert [int(codes.max()) for codes in found] == [spec.qmax for spec in specs]


def test_sqnr():
    x: Any = np.array([3.0, 4.0], np.float32)
    np.testing.assert_allclose(qjax.sqnr_db(x, x + np.float32(0.5)), 10 * np.log10(50), rtol=1e-6)
    assert float(qjax.sqnr_db(x, x)) == np.inf
    assert float(qjax.sqnr_db(0 * x, 0 * x)) == np.inf, "equal arrays, be they zero"
    assert float(qjax.sqnr_db(0 * x, x)) == -np.inf


@pytest.mark.parametrize("bits", [3, 6, 9])
def test_a_uniform_variable_gains_six_decibels_per_bit(bits: int):
    x: Any = np.linspace(0, 1, 10**5, dtype=np.float32)
    qparams = affine_qparams(x.min(), x.max(), QuantSpec(bits, symmetric=False))
    steps = 2**bits - 1  # signal 1/3, noise (1 / steps)² / 12
    np.testing.assert_allclose(
        qjax.sqnr_db(x, qjax.fake_quant(x, qparams)), 10 * np.log10(4 * steps**2), atol=0.1
    )


def test_constants_of_a_program_can_be_quantized_within_it():
    qparams = QParams(jnp.float32(0.5), jnp.int32(0), -7, 7)
    kernel = jnp.array([0.6, -2.0, 99.0])

    @jax.jit
    def scaled(x: jax.Array) -> jax.Array:
        codes = qjax.quantize_array(kernel, qparams)
        return x * (qjax.dequantize(codes, qparams) + qjax.fake_quant(kernel, qparams))

    np.testing.assert_array_equal(scaled(jnp.float32(1)), [1.0, -4.0, 7.0])
