"""Calibration statistics: however the values are split, and against NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from qjax.fit import observers
from qjax.fit.observers import Observer, observe, observe_stacked

SHAPE = (8, 5)  # all the values of a property's example
SPLITS = ((8,), (3, 5), (2, 2, 4))  # few, so that each observer compiles for few shapes
LOW, HIGH, BINS = -2.0, 3.0, 32
BIN = (HIGH - LOW) / BINS

values = st_numpy.arrays(np.float32, SHAPE, elements=st.floats(LOW, HIGH, width=32))


def split(x: np.ndarray, sizes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(part) for part in np.split(x, np.cumsum(sizes)[:-1])]


def histogram_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts by the definition of a bin, in float32 as the observer computes."""
    places = np.floor((x.ravel() - np.float32(LOW)) / np.float32(BIN))
    counts = np.bincount(np.clip(places, 0, BINS - 1).astype(int), minlength=BINS)
    return counts.astype(np.float32), np.linspace(LOW, HIGH, BINS + 1, dtype=np.float32)


class Case(NamedTuple):
    """An observer and what its statistic is, in NumPy."""

    id: str
    observer: Observer
    reference: Callable[[np.ndarray], Any]


CASES = (
    Case("min_max", observers.min_max(), lambda x: (x.min(), x.max())),
    Case("absmax", observers.absmax(), lambda x: np.abs(x).max()),
    Case("histogram", observers.histogram(LOW, HIGH, BINS), histogram_of),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@hypothesis.given(values)
def test_split_batches_equal_one_batch(case: Case, x: np.ndarray):
    for sizes in SPLITS:
        statistic = observe(case.observer, split(x, sizes))
        chex.assert_trees_all_close(statistic, case.reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@hypothesis.given(values)
def test_stacked_batches_equal_a_list_of_them(case: Case, x: np.ndarray):
    for count in (1, 2, 4):
        stacked = jnp.asarray(x).reshape(count, -1, SHAPE[1])
        chex.assert_trees_all_close(
            observe_stacked(case.observer, stacked), case.reference(x), rtol=1e-5, atol=1e-5
        )


PERCENTILES = {percent: observers.percentile(percent, LOW, HIGH, BINS) for percent in (50, 90, 100)}


@pytest.mark.parametrize("percent", PERCENTILES)
@hypothesis.given(values)
def test_percentile_cuts_no_more_than_the_tails_and_no_bin_less(percent: int, x: np.ndarray):
    tail = (100 - percent) / 200 * x.size
    for sizes in SPLITS:
        low, high = map(float, observe(PERCENTILES[percent], split(x, sizes)))
        slack = 1e-4
        assert LOW <= low <= high <= HIGH + slack
        assert np.sum(x < low - slack) <= tail + slack
        assert np.sum(x > high + slack) <= tail + slack
        assert np.sum(x <= low + BIN + slack) >= tail - slack
        assert np.sum(x >= high - BIN - slack) >= tail - slack


def test_percentile_of_a_one_sided_range_takes_the_whole_tail_from_the_other_end():
    x = np.linspace(0, 1, 1001, dtype=np.float32)
    for sign in (1.0, -1.0):
        ends = sorted((0.0, sign))
        low, high = observe(observers.percentile(90, *ends, bins=1000), [sign * jnp.asarray(x)])
        assert sorted((abs(float(low)), abs(float(high)))) == [0.0, pytest.approx(0.9, abs=0.002)]


def test_values_outside_count_in_the_end_bins():
    counts, edges = observe(observers.histogram(0, 1, 4), [jnp.array([-5.0, 0.1, 0.6, 1.0, 7.0])])
    np.testing.assert_array_equal(counts, [2, 0, 1, 2])
    np.testing.assert_allclose(edges, [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_has_a_percentile(value: float):
    low, high = observe(observers.percentile(99, value, value), [jnp.full(4, value)])
    np.testing.assert_allclose([low, high], [value, value])


def test_moving_average_follows_its_recursion():
    batches = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.7 * low + 0.3 * batch.min(), 0.7 * high + 0.3 * batch.max()
    statistic = observe(observers.moving_average(0.7), map(jnp.asarray, batches))
    np.testing.assert_allclose(statistic, (low, high), rtol=1e-6)


@pytest.mark.parametrize(
    "observer",
    [
        *(case.observer for case in CASES),
        observers.moving_average(),
        observers.percentile(90, LOW, HIGH),
    ],
)
def test_bfloat16_batches_are_accumulated_in_float32(observer: Observer):
    x = jnp.linspace(LOW, HIGH, 40, dtype=jnp.bfloat16).reshape(SHAPE)
    statistic = observe(observer, [x])
    chex.assert_trees_all_close(statistic, observe(observer, [x.astype(jnp.float32)]))
    assert {leaf.dtype for leaf in jax.tree.leaves(statistic)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: observers.moving_average(1.0), "`decay` must be from 0 to below 1; got 1.0"),
        (lambda: observers.histogram(0, 1, 0), "`bins` must be at least 1; got 0"),
        (lambda: observers.percentile(0, 0, 1), "`percent` must be above 0 and at most 100; got 0"),
        (lambda: observers.percentile(101, 0, 1), "`percent` must be .* at most 100; got 101"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Observer], message: str):
    with pytest.raises(ValueError, match=message):
        make()
