"""Narrow accumulators do what registers of that width do."""

from typing import Any, get_args

import hypothesis
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax.integer.accumulator import (
    CHECKS,
    OVERFLOWS,
    Accumulator,
    Check,
    Overflow,
    fit,
    signed_width,
    sum_term_by_term,
)
from qjax.study.accumulators import accumulator_ranges, study_accumulators

integers = st.integers(-(2**31), 2**31 - 1)


@hypothesis.given(integers, st.integers(2, 32))
def test_sums_that_do_not_fit_wrap_or_saturate(value: int, bits: int):
    acc = jnp.asarray(np.int32(value))
    half = 2 ** (bits - 1)
    assert int(fit(acc, Accumulator(bits, "wrap"))) == (value + half) % 2**bits - half
    assert int(fit(acc, Accumulator(bits, "saturate"))) == max(-half, min(half - 1, value))


@hypothesis.given(integers, integers)
def test_the_signed_width_is_the_least_that_holds_both(a: int, b: int):
    low, high = sorted((a, b))
    bits = signed_width(low, high)
    assert -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)
    fewer = bits - 2
    assert fewer < 0 or low < -(2**fewer) or high >= 2**fewer


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [(0, 0, 1), (-1, 0, 1), (0, 1, 2), (-128, 127, 8), (-129, 0, 9), (0, 128, 9), (-2, -2, 2)],
)
def test_the_signed_width_at_the_edges(low: int, high: int, bits: int):
    assert signed_width(low, high) == bits


def loop(x: Any, kernel: Any, bias: Any, bits: int, overflow: str) -> np.ndarray:
    """One register per output, in Python's integers."""
    half = 2 ** (bits - 1)

    def fitted(value: int) -> int:
        if overflow == "wrap":
            return (value + half) % 2**bits - half
        return max(-half, min(half - 1, value))

    found = np.zeros((len(x), *bias.shape), np.int64)
    for p, g, m in np.ndindex(found.shape):
        acc = fitted(int(bias[g, m]))
        for k in range(x.shape[2]):
            acc = fitted(acc + int(x[p, g, k]) * int(kernel[g, k, m]))
        found[p, g, m] = acc
    return found


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("bits", [6, 9, 20])
def test_term_by_term_equals_a_loop(overflow: Any, bits: int):
    rng = np.random.default_rng(bits)
    x, kernel = rng.integers(-8, 8, (5, 2, 7)), rng.integers(-7, 8, (2, 7, 3))
    bias = rng.integers(-40, 40, (2, 3))
    arrays = [jnp.asarray(array, jnp.int32) for array in (x, kernel, bias)]
    found = sum_term_by_term(*arrays, Accumulator(bits, overflow, "term"))
    np.testing.assert_array_equal(found, loop(x, kernel, bias, bits, overflow))


def test_the_names_are_those_of_the_tables():
    assert get_args(Overflow) == tuple(OVERFLOWS) == tuple(r.name for r in OVERFLOWS.values())
    assert get_args(Check) == tuple(CHECKS) == tuple(rule.name for rule in CHECKS.values())


# ---- Networks

CASE = next(case for case in models.CASES if case.id == "plain_nchw")


@pytest.fixture(scope="module")
def q() -> qjax.Quantized:
    return qjax.quantize(CASE.apply_fn, CASE.params, CASE.x, qjax.Recipe().naive())


def logits(q: qjax.Quantized, accumulator: Any) -> np.ndarray:
    return np.asarray(qjax.integer(q, accumulator=accumulator)(q.params, CASE.x))


def test_wide_enough_accumulators_change_nothing(q: qjax.Quantized):
    expected = np.asarray(qjax.integer(q)(q.params, CASE.x))
    needed = {layer.name: layer.worst_bits for layer in accumulator_ranges(q, [CASE.x])}
    for overflow in OVERFLOWS:
        for check in CHECKS:
            chosen: Any = {n: Accumulator(b, overflow, check) for n, b in needed.items()}
            np.testing.assert_array_equal(logits(q, chosen), expected)


def test_what_the_images_need_is_enough_at_the_end_of_the_sum(q: qjax.Quantized):
    expected = np.asarray(qjax.integer(q)(q.params, CASE.x))
    met = {layer.name: Accumulator(layer.bits) for layer in accumulator_ranges(q, [CASE.x])}
    np.testing.assert_array_equal(logits(q, met), expected)
    fewer = {name: acc._replace(bits=acc.bits - 1) for name, acc in met.items()}
    assert np.any(logits(q, fewer) != expected)


def test_wrapping_is_the_same_after_every_term_and_after_the_sum(q: qjax.Quantized):
    np.testing.assert_array_equal(
        logits(q, Accumulator(9, "wrap", "term")), logits(q, Accumulator(9, "wrap", "sum"))
    )


def test_ranges_are_those_of_the_accumulators(q: qjax.Quantized):
    found = accumulator_ranges(q, [CASE.x[:2], CASE.x[2:]])
    acc = qjax.integer(q).accumulators(q.params, CASE.x)
    assert [layer.name for layer in found] == [record.name for record in q.report]
    for layer in found:
        values = np.asarray(acc[layer.name], np.float64)
        assert (layer.low, layer.high) == (min(values.min(), 0), max(values.max(), 0))
        np.testing.assert_allclose(
            (layer.mean, layer.deviation), (values.mean(), values.std()), rtol=1e-9
        )
        assert layer.bits <= layer.worst_bits


def test_a_study_finds_the_least_width_without_loss(q: qjax.Quantized):
    expected = np.argmax(np.asarray(qjax.integer(q)(q.params, CASE.x)), -1)

    def accuracy(function: Any) -> float:
        found = np.argmax(np.asarray(function(q.params, CASE.x)), -1)
        return 100 * float(np.mean(found == expected))

    study = study_accumulators(q, [CASE.x], accuracy, widths=(4, 8, 12, 16, 20, 32))
    assert study.top1[32] == 100.0 and study.top1[4] < 100.0
    assert all(study.top1[bits] == 100.0 for bits in study.top1 if bits >= study.least)
    assert study.energy[1] < study.energy[0]
    lines = str(study).splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].startswith("layer")


@pytest.mark.parametrize(
    ("accumulator", "message"),
    [
        (Accumulator(1), "`accumulator` must have 2 to 32 bits; got 1"),
        (
            Accumulator(9, "clip"),
            "`accumulator.overflow` must be one of wrap, saturate; got 'clip'",
        ),  # type: ignore[arg-type]
        (Accumulator(9, "wrap", "end"), "`accumulator.check` must be one of sum, term; got 'end'"),
        ({"nowhere": Accumulator(9)}, "`accumulator` names 'nowhere', which is no layer"),
    ],
)
def test_bad_accumulators_are_refused(accumulator: Any, message: str, q: qjax.Quantized):
    with pytest.raises(ValueError, match=message):
        qjax.integer(q, accumulator=accumulator)


def test_a_study_needs_32_bits_to_compare_with(q: qjax.Quantized):
    with pytest.raises(ValueError, match="`widths` must have 32"):
        study_accumulators(q, [CASE.x], lambda function: 0.0, widths=(8,))
