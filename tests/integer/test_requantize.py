"""Every arithmetic equals its definition in NumPy's 64-bit integers, bit for bit."""

import math
from fractions import Fraction
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qjax.integer.requantize import ARITHMETICS, fixed_point, multiply_shift

MOST = 2**31 - 1
integers = st.lists(st.integers(-MOST, MOST), min_size=8, max_size=8)
exponents = st.integers(-40, 35)
fractions = st.floats(0.5, 1.0, exclude_max=True, width=32)


@partial(jax.jit, static_argnums=2)
def run(acc: jax.Array, multiplier: jax.Array, arithmetic: str) -> jax.Array:
    return ARITHMETICS[arithmetic].requantize(acc, multiplier)


def reference(acc: int, multiplier: float, arithmetic: str) -> int:
    """The table of the module, on Python's unbounded integers and exact fractions."""
    fraction, exponent = math.frexp(multiplier)
    m, n = int(fraction * 2**31), 31 - exponent
    match arithmetic:
        case "fixed_point" if n >= 0:
            result = (acc * m + (1 << n >> 1)) >> n
        case "floor" if n >= 0:
            result = (acc * m) >> n
        case "fixed_point" | "floor":
            result = acc * m << -n
        case "shift":
            k = round(-math.log2(multiplier))
            result = round(Fraction(acc, 1 << k)) if k >= 0 else acc << -k  # half to even
        case "divide" if multiplier < 1:
            d = round(1 / np.float32(multiplier))
            result = (2 * acc + d) // (2 * d)
        case "divide":
            result = acc * round(min(multiplier, 2.0**30))
        case _:
            product = np.round(np.float32(acc) * np.float32(multiplier))
            return int(np.clip(product, -(2**31) + 2**7, 2**31 - 2**7))
    return int(np.clip(result, -MOST, MOST))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@hypothesis.given(values=integers, exponent=exponents, fraction=fractions)
def test_arithmetic(arithmetic: str, values: list[int], exponent: int, fraction: float):
    # An M whose logarithm is halfway, or 1/M, is left to the rounding of float32.
    hypothesis.assume(abs(fraction - math.sqrt(0.5)) > 1e-5)
    multiplier = float(np.ldexp(np.float32(fraction), exponent))
    hypothesis.assume(arithmetic != "divide" or multiplier > 2**-29)
    found = run(jnp.asarray(values, jnp.int32), jnp.float32(multiplier), arithmetic)
    expected = [reference(value, multiplier, arithmetic) for value in values]
    if arithmetic in ("fixed_point", "floor") and exponent > 30:  # beyond the representable M
        expected = [int(np.sign(value)) * MOST for value in values]
    if arithmetic in ("fixed_point", "floor") and exponent < -31:  # rounds every int32 to 0
        expected = [0 for _ in values]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 30])
def test_shifts_round_half_to_even(k: int):
    halves = np.array([-7, -5, -3, -1, 1, 3, 5, 7]) << (k - 1)
    halves = halves[np.abs(halves) <= MOST]
    around = (halves[:, None] + np.array([-1, 0, 1])).reshape(-1)
    found = run(jnp.asarray(around, jnp.int32), jnp.float32(2.0**-k), "shift")
    np.testing.assert_array_equal(found, np.rint(around / 2.0**k))


@hypothesis.given(values=integers, m=st.integers(0, MOST), n=st.integers(0, 62))
def test_products_of_64_bits(values: list[int], m: int, n: int):
    acc = np.asarray(values, np.int64)
    for rounds in (False, True):
        found = multiply_shift(*(jnp.int32(v) for v in (acc, m, n)), rounds=rounds)
        exact = [(int(a) * m + ((1 << n >> 1) if rounds else 0)) >> n for a in acc]
        np.testing.assert_array_equal(found, np.clip(exact, -MOST, MOST))


@hypothesis.given(exponent=st.integers(-31, 30), fraction=fractions)
def test_a_fixed_point_multiplier_is_exact(exponent: int, fraction: float):
    multiplier = np.ldexp(np.float32(fraction), exponent)
    m, n = (int(v) for v in fixed_point(jnp.float32(multiplier)))
    assert m * 2.0**-n == float(multiplier)
    assert 2**30 <= m < 2**31 and 1 <= n <= 62


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_multiplier_of_1_changes_nothing(arithmetic: str):
    acc = jnp.arange(-300, 300)
    np.testing.assert_array_equal(run(acc, jnp.float32(1), arithmetic), acc)


def test_a_multiplier_per_channel():
    acc, multiplier = jnp.array([[1000, 1000], [-30, -30]]), jnp.array([[0.5, 0.01]], jnp.float32)
    for arithmetic in ARITHMETICS:
        columns = [run(acc[:, i], multiplier[0, i], arithmetic) for i in range(2)]
        np.testing.assert_array_equal(run(acc, multiplier, arithmetic), np.stack(columns, 1))
