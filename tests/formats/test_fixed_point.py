"""Fixed-point numbers: the Q-format of least range, its name, and NumPy's rounding."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import QParams
from qjax.formats.fixed_point import QFormat, q_formats

number = st.floats(-1000, 1000, width=32)
# Two sizes, so that each operation compiles twice.
values = st.one_of(st.lists(number, min_size=n, max_size=n) for n in (1, 6))
widths = st.integers(2, 16)


def in_numpy(x: Any, bits: int, n: int, is_signed: bool) -> np.ndarray:
    low = -(2 ** (bits - 1)) if is_signed else 0
    return np.clip(np.rint(np.ldexp(np.float64(x), n)), low, low + 2**bits - 1)


@hypothesis.given(values, widths, st.booleans())
def test_the_format_is_the_finest_that_clips_nothing(x: list[float], bits: int, is_signed: bool):
    x = x if is_signed else [abs(value) for value in x]
    found = qjax.to_fixed_point(x, bits, is_signed=is_signed)
    m, n, _ = found.format
    assert found.format.bits == bits == is_signed + m + n
    codes = in_numpy(x, bits, n, is_signed)
    np.testing.assert_array_equal(found.codes, codes)
    assert np.all(np.abs(np.ldexp(codes, -n) - np.float64(x)) <= math.ldexp(0.5, -n))
    if any(x):
        finer = np.ldexp(in_numpy(x, bits, n + 1, is_signed), -n - 1)
        assert np.any(np.abs(finer - np.float64(x)) > math.ldexp(0.25, -n)), "it would clip"
    np.testing.assert_array_equal(found.to_float(), np.float32(np.ldexp(codes, -n)))


@hypothesis.given(values, widths, st.integers(-3, 12), st.booleans())
def test_a_given_format_rounds_half_to_even_and_clips(
    x: list[float], bits: int, m: int, is_signed: bool
):
    found = qjax.to_fixed_point(x, bits, m, is_signed=is_signed)
    n = bits - is_signed - m
    np.testing.assert_array_equal(found.codes, in_numpy(x, bits, n, is_signed))
    again = qjax.to_fixed_point(found.to_float(), bits, m, is_signed=is_signed)
    np.testing.assert_array_equal(again.codes, found.codes)


def test_a_sign_is_no_integer_bit():
    """Q3.4: 1 + 3 + 4 bits, −8 … 8 − 1/16, as Texas Instruments writes it."""
    found = qjax.to_fixed_point([-9.0, -8.0, 7.9375, 9.0, 0.03125, 0.09375], integer_bits=3)
    assert str(found.format) == "Q3.4"
    np.testing.assert_array_equal(found.codes, [-128, -128, 127, 127, 0, 2])
    assert found.codes.dtype == jnp.int8
    unsigned = qjax.to_fixed_point([-1.0, 15.9375, 16.0], integer_bits=4, is_signed=False)
    assert str(unsigned.format) == "UQ4.4"
    np.testing.assert_array_equal(unsigned.codes, [0, 255, 255])
    assert unsigned.codes.dtype == jnp.uint8


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ([0.0, 0.0], "Q0.7"),
        ([-1.0], "Q0.7"),
        ([1.0], "Q1.6"),
        ([0.99], "Q0.7"),
        ([0.2], "Q-2.9"),
        ([5000.0], "Q13.-6"),
        ([], "Q0.7"),
    ],
)
def test_the_format_from_the_range(x: list[float], text: str):
    assert str(qjax.to_fixed_point(x).format) == text


def test_under_jit_the_format_has_to_be_given():
    x = jnp.array([0.3, -2.7])
    found = jax.jit(lambda x: qjax.to_fixed_point(x, integer_bits=2))(x)
    assert found.format == QFormat(2, 5)
    np.testing.assert_array_equal(found.to_float(), qjax.to_fixed_point(x, 8, 2).to_float())
    with pytest.raises(ValueError, match="`integer_bits` must be given where `x` is traced"):
        jax.jit(qjax.to_fixed_point)(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0), "`bits` must be an integer from 1 to 16; got 0"),
        (([1.0], 8.0), "`bits` must be an integer from 1 to 16; got 8.0"),
        (([np.inf],), "`x` must be finite; found NaN or infinity"),
        (([np.nan, 1.0],), "`x` must be finite; found NaN or infinity"),
    ],
)
def test_what_has_no_format_is_refused(arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        qjax.to_fixed_point(*arguments)


def test_the_formats_of_a_tensor():
    def of(scale: Any, zero_point: Any, *limits: int) -> list[str]:
        qparams = QParams(jnp.float32(scale), jnp.int32(zero_point), *limits)
        return list(map(str, q_formats(qparams)))

    assert of(0.0625, 0, -127, 127) == ["Q3.4"]
    assert of(0.0625, 128, 0, 255) == ["Q3.4"]
    assert of(0.0625, 0, 0, 255) == ["UQ4.4"]
    assert of([1, 0.25, 0.25], [0, 0, 0], -7, 7) == ["Q1.2", "Q3.0"]
    assert of(0.06, 0, -127, 127) == of(0.0625, 3, 0, 255) == of([1, 0.3], [0, 0], -7, 7) == []
