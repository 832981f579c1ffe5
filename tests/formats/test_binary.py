"""One-bit formats: signs times a scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qjax
from qjax import QuantSpec
from qjax.formats.base import Format
from qjax.formats.binary import BINARY, Binary
from qjax.formats.packing import pack_codes, unpack_positions

SPEC = QuantSpec(1, format="binary")
finite = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)  # which XLA takes for 0


def lists(elements: st.SearchStrategy, *sizes: int) -> st.SearchStrategy:
    """Of few sizes, so that few programs are compiled."""
    return st.one_of(st.lists(elements, min_size=n, max_size=n) for n in sizes)


def binary(scale: float) -> Binary:
    return Binary(jnp.float32(scale), jnp.int32(0), -1, 1)


def test_it_is_a_format_of_one_bit_in_int8():
    format = SPEC.cover(jnp.float32(-3), jnp.float32(2))
    assert isinstance(format, Format) and isinstance(format, Binary)
    assert (format.bits, str(format.dtype), format.spacing) == (1, "int8", 2)
    assert float(format.scale) == 3.0


@given(lists(finite, 1, 9), st.floats(0.015625, 64, width=32))
def test_values_are_the_signs_times_the_scale(values: list[float], scale: float):
    x, format = np.float32(values), binary(scale)
    expected = np.where(x >= 0, np.float32(scale), -np.float32(scale))
    np.testing.assert_array_equal(format.project(x), expected)
    np.testing.assert_array_equal(format.decode(format.encode(x)), expected)
    np.testing.assert_array_equal(format.project(format.project(x)), expected)


def test_the_gradient_passes_where_the_magnitude_is_within_the_scale():
    x = jnp.array([-3.0, -0.5, 0.25, 1.75, 2.5])
    gradient = jax.vmap(jax.grad(lambda x, s: binary(1.0).scaled(s).project(x), (0, 1)), (0, None))
    of_x, of_scale = gradient(x, jnp.float32(2.0))
    np.testing.assert_array_equal(of_x, [0, 1, 1, 1, 0])
    np.testing.assert_allclose(of_scale, [-1, -1 + 0.25, 1 - 0.125, 1 - 0.875, 1])


@given(lists(st.booleans(), 1, 7, 8, 9, 70))
def test_codes_take_one_bit_each(values: list[bool]):
    codes = np.where(values, 1, -1).astype(np.int8)
    stream = pack_codes(jnp.asarray(codes), -1, 1, 2)
    assert stream.nbytes == -(-len(codes) // 8)
    np.testing.assert_array_equal(
        np.unpackbits(np.asarray(stream), count=len(codes), bitorder="little"), values
    )
    np.testing.assert_array_equal(2 * unpack_positions(stream, 1, codes.shape) - 1, codes)


def test_a_symmetric_width_of_one_bit_is_binary():
    assert qjax.recipe(1).weights == SPEC
    assert qjax.recipe(8, weight_bits=1).weights == SPEC
    assert qjax.recipe(1).inputs == QuantSpec(1, symmetric=False, granularity="per_tensor")
    mixed = qjax.recipe(1, first_last_bits=8, overrides={"b": {"weight_bits": 2}})
    found = [layer.weights for layer in mixed.by_layer(["a", "b", "c", "d"]).values()]
    assert [spec.bits for spec in found if spec] == [8, 2, 1, 8]
    assert [spec.family.name for spec in found if spec] == ["uniform"] * 2 + ["binary", "uniform"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "`bits` must be at least 2 for symmetric codes; got 1. For one bit"),
        ({"bits": 2, "format": "binary"}, "`bits` must be 1 in the format binary; got 2"),
    ],
)
def test_other_widths_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


def test_for_activations_it_is_refused():
    with pytest.raises(ValueError, match="`inputs` must have a uniform format; got binary"):
        qjax.recipe(8, inputs=SPEC)


def test_the_search_finds_the_mean_magnitude():
    """The scale of least squared error is the mean of |w|: Rastegari et al., 2016, eq. 6."""
    kernel = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    recipe = qjax.recipe(8, weight_bits=1, inputs=None, outputs=None, range_method="mse")
    recipe = qjax.Recipe.from_json(
        recipe.to_json() | {"rounding": "nearest", "reconstructions": 0, "sweeps": 0}
    )
    x = np.random.default_rng(1).normal(size=(64, 40)).astype(np.float32)
    q = qjax.quantize(lambda params, x: x @ params["w"], {"w": jnp.asarray(kernel)}, x, recipe)
    weights = q.params["layers"]["w"].weights
    assert weights.name == BINARY.name
    np.testing.assert_allclose(weights.scale[0, 0], np.abs(kernel).mean(0), rtol=0.01)
    np.testing.assert_array_equal(q.params["layers"]["w"].kernel[0], np.where(kernel >= 0, 1, -1))
