"""Powers of two: exact neighbours, and fixed-point formats that are the finest to cover a range."""

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qjax import QuantSpec
from qjax.formats.scales import (
    SCALES,
    fixed_point_qparams,
    nearest_power_of_two,
    power_of_two_above,
    power_of_two_below,
)

positive = st.floats(2.0**-60, 2.0**60, width=32)
bits = st.integers(2, 16)


@hypothesis.given(positive)
def test_the_powers_of_two_around_a_number(x: float):
    below = math.ldexp(1.0, math.frexp(x)[1] - 1)
    above = below if below == x else 2 * below
    assert float(power_of_two_below(jnp.float32(x))) == below
    assert float(power_of_two_above(jnp.float32(x))) == above
    nearest = min((2 * below, below), key=lambda power: abs(power - x))
    assert float(nearest_power_of_two(jnp.float32(x))) == nearest


@pytest.mark.parametrize("symmetric", [True, False])
@hypothesis.given(low=st.floats(-100, 0, width=32), high=st.floats(0, 100, width=32), bits=bits)
def test_a_fixed_point_format_is_the_finest_that_covers(
    symmetric: bool, low: float, high: float, bits: int
):
    hypothesis.assume(max(-low, high) > 1e-6)
    spec = QuantSpec(bits, symmetric, scale="power_of_two")
    qparams = spec.cover(jnp.float32(low), jnp.float32(high))
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    assert math.frexp(scale)[0] == 0.5
    assert (qparams.bits, qparams.dtype) == (bits, spec.dtype)
    is_signed = symmetric or low < 0
    assert zero_point == (0 if symmetric or not is_signed else 2 ** (bits - 1))
    codes = int(qparams.qmin) - zero_point, int(qparams.qmax) - zero_point

    def covers(scale: float) -> bool:
        return scale * codes[0] <= low and high <= scale * codes[1]

    assert covers(scale) and not covers(scale / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_per_channel_is_one_range_per_channel(symmetric: bool):
    spec = QuantSpec(5, symmetric, scale="power_of_two")
    low, high = jnp.float32([-3, 0, 0, -0.1]), jnp.float32([1, 0, 7, 0.9])
    together = spec.cover(low, high)
    for channel in range(4):
        alone = spec.cover(low[channel], high[channel])
        assert float(together.scale[channel]) == float(alone.scale)
        assert int(together.zero_point[channel]) == int(alone.zero_point)
    assert float(together.scale[1]) == 1.0, "of zeros"


@hypothesis.given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4))
def test_zero_is_exact_and_inside_the_range_the_error_is_half_a_step(values: list[float]):
    x = jnp.float32(values)
    qparams = fixed_point_qparams(x.min(), x.max(), QuantSpec(8, False, scale="power_of_two"))
    found = np.asarray(qparams.project(x), np.float64)
    assert np.all(np.abs(found - np.float64(values)) <= float(qparams.scale) / 2)
    assert float(qparams.project(jnp.float32(0))) == 0.0
    np.testing.assert_array_equal(qparams.project(jnp.float32(found)), found)


def test_the_choices_are_a_table():
    with pytest.raises(ValueError, match="`scale` must be one of free, power_of_two; got 'fixed'"):
        QuantSpec(scale="fixed")
    assert QuantSpec(scale=SCALES["power_of_two"]).scales is SCALES["power_of_two"]
    assert "scale" not in QuantSpec().to_json()
    spec = QuantSpec(scale="power_of_two")
    assert QuantSpec(**spec.to_json()) == spec
