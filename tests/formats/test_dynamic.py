"""Ranges at run time: the extremes of the tensor, or of every example by itself."""

import json
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qjax import QParams, QuantSpec
from qjax.formats.dynamic import Dynamic, dynamic


def made(bits: int = 8, symmetric: bool = False, axis: int | None = None, **fields: Any) -> Dynamic:
    granularity = "per_tensor" if axis is None else "per_example"
    bounds = {"bounds": fields.pop("bounds")} if "bounds" in fields else {}
    spec = QuantSpec(bits, symmetric, granularity, ranges="dynamic", **fields)
    return dynamic(spec, spec.limits, axis, **bounds)


def values(seed: int, *shape: int) -> Any:
    rng = np.random.default_rng(seed)
    return jnp.float32(rng.normal(size=shape) * rng.uniform(0.01, 100, (shape[0], 1, 1)))


@pytest.mark.parametrize("symmetric", [True, False])
@hypothesis.given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), low=st.floats(-9, 9))
def test_nothing_is_clipped_and_the_error_is_half_a_step(
    symmetric: bool, seed: int, bits: int, low: float
):
    x = jnp.maximum(values(seed, 3, 4, 5), jnp.float32(low))
    format = made(bits, symmetric)
    found = format.at(x)
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    extremes = min(float(x.min()), 0), max(float(x.max()), 0)
    width = max(-extremes[0], extremes[1]) if symmetric else extremes[1] - extremes[0]
    np.testing.assert_allclose(found.scale, width / steps, rtol=2**-15)
    error = np.abs(np.asarray(format.project(x), np.float64) - np.asarray(x, np.float64))
    # The zero point is rounded too: at the ends an asymmetric range may be off by half a step more.
    assert error.max() <= float(found.scale) * (0.5 if symmetric else 1.0) * (1 + 2**-7)
    assert float(found.project(jnp.float32(0))) == 0.0


@hypothesis.given(seed=st.integers(0, 2**16), axis=st.integers(0, 2), symmetric=st.booleans())
def test_the_range_of_an_example_is_that_of_the_example_alone(
    seed: int, axis: int, symmetric: bool
):
    x = jnp.moveaxis(values(seed, 3, 4, 5), 0, axis)
    rounded = made(6, symmetric, axis).project(x)
    alone = made(6, symmetric)
    for index in range(3):
        example = jax.lax.index_in_dim(x, index, axis, keepdims=False)
        expected = alone.project(example)
        found = jax.lax.index_in_dim(rounded, index, axis, keepdims=False)
        np.testing.assert_array_equal(found, expected)


def test_a_range_is_cut_to_its_bounds():
    x = jnp.float32([-5, 1, 2, 9])
    found = made(bounds=(0.0, 6.0)).at(x)
    assert int(found.zero_point) == 0
    np.testing.assert_allclose(float(found.range[1]), 6, rtol=2**-15)
    np.testing.assert_allclose(found.project(x), [0, 1, 2, 6], atol=0.02)


def test_zeros_stay_zeros():
    assert not np.any(made(4).project(jnp.zeros((2, 3))))
    assert not np.any(made(4, True, 0).project(jnp.zeros((2, 3))))


def test_scales_can_be_powers_of_two():
    found = made(axis=0, scale="power_of_two").at(jnp.float32([[3.0, 0.1], [-0.3, 0.1]]))
    np.testing.assert_array_equal(found.scale, [[2.0**-6], [2.0**-8]])
    np.testing.assert_array_equal(found.zero_point, [[0], [128]])


def test_the_gradient_passes_straight_through():
    x = jnp.linspace(-1, 2, 50)
    gradient = jax.grad(lambda x: jnp.sum(3 * made().project(x)))(x)
    np.testing.assert_array_equal(gradient[1:-1], np.full(48, 3.0))


def test_widths_that_are_stored_alike_share_a_program():
    project = jax.jit(chex.assert_max_traces(lambda x, format: format.project(x), n=1))
    found = [float(project(jnp.float32([0.0, 0.4, 1.0]), made(bits))[1]) for bits in (2, 4, 8)]
    np.testing.assert_allclose(found, [1 / 3, 6 / 15, 102 / 255], rtol=2**-15)


@pytest.mark.parametrize(
    "format", [made(), made(3, True, 1), made(bounds=(0.0, np.inf)), made(scale="power_of_two")]
)
def test_json_round_trip(format: Dynamic):
    again = Dynamic.from_json(json.loads(json.dumps(format.to_json(), allow_nan=False)))
    chex.assert_trees_all_equal(again, format, strict=True)
    assert (again.bits, again.dtype) == (format.bits, format.dtype)


def test_a_known_grid_is_the_same_for_every_tensor():
    qparams = QParams(jnp.float32(0.5), jnp.int32(0), -7, 7)
    assert qparams.at(jnp.ones(3)) is qparams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranges": "sometimes"}, "`ranges` must be one of static, dynamic; got 'sometimes'"),
        (
            {"granularity": "per_example"},
            "`granularity` per_example needs `ranges` dynamic; got static",
        ),
        (
            {"granularity": "per_channel", "ranges": "dynamic"},
            "`granularity` must be per_tensor or per_example where `ranges` are dynamic; got per_c",
        ),
    ],
)
def test_what_has_no_range_at_run_time_is_refused(fields: Any, message: str):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)
