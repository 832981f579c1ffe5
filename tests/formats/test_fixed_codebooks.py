"""The tables that are the same for every kernel: powers of two, their sums, quantiles, NF4."""

from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import QuantSpec
from qjax.formats.apot import sums_of_powers
from qjax.formats.power_of_two import powers_of_two
from qjax.formats.quantile import normal_quantiles

# Dettmers et al., 2023, appendix E, as printed there.
PUBLISHED = """
-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
0.7229568362236023, 1.0
"""


def levels(name: str, bits: int) -> np.ndarray:
    """Of the format that covers [−1, 1]."""
    format = QuantSpec(bits, format=name).cover(jnp.float32(-1), jnp.float32(1))
    return np.asarray(format.levels, np.float64) * float(format.scale)


def test_nf4_is_the_published_table():
    published = np.array([float(text) for text in PUBLISHED.split(",")])
    np.testing.assert_array_equal(levels("nf4", 4), np.float32(published))
    np.testing.assert_allclose(levels("quantile", 4), published, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantiles_are_at_even_distances_in_probability(bits: int):
    found = normal_quantiles(bits)
    half, widest = 2 ** (bits - 1), NormalDist().inv_cdf(1 - (0.5**bits + 1 / (2**bits - 1)) / 4)
    shares = np.array([NormalDist().cdf(level * widest) for level in found.tolist()])
    assert len(found) == 2**bits and found[half - 1] == 0 and (found[0], found[-1]) == (-1, 1)
    for side in (shares[:half], shares[half - 1 :]):
        np.testing.assert_allclose(np.diff(side), np.diff(side).mean(), rtol=1e-3)


def test_powers_are_those_of_the_width():
    assert powers_of_two(2) == [1]
    assert powers_of_two(5) == [2**k for k in range(15)]
    np.testing.assert_array_equal(levels("power_of_two", 3), [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    for bits in (6, 7, 8):  # powers that no 16-bit code holds are left out
        assert sorted(set(powers_of_two(bits))) == powers_of_two(5)
        assert len(powers_of_two(bits)) == 2 ** (bits - 1) - 1


# Terms of the authors' code (build_power_value in the repository of arXiv:1909.13144).
TERMS = {
    3: [[1, 2, 3]],
    4: [[1, 2, 4], [3]],
    5: [[1, 3, 5], [2, 4, 6]],
    6: [[1, 3, 6], [2, 4, 7], [5]],
    7: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
}


@pytest.mark.parametrize("bits", TERMS)
def test_sums_of_powers_are_those_of_the_paper(bits: int):
    sums = np.zeros(1)
    for exponents in TERMS[bits]:
        sums = (sums[:, None] + np.array([0, *(2.0**-e for e in exponents)])).ravel()
    expected = np.unique(sums / sums.max())
    assert len(expected) == 2 ** (bits - 1)
    np.testing.assert_allclose(levels("apot", bits)[2 ** (bits - 1) - 1 :], expected, rtol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_sum_is_there_once(bits: int):
    found = sums_of_powers(bits)
    assert len(set(found)) == len(found) == 2 ** (bits - 1) - 1
    assert found == sorted(found) and found[0] == 1
