"""Studies: every case is quantized as its label says, and the search for bits stops in time."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import small

from qjax.recipe import Recipe
from qjax.study.questions import QUESTIONS, Measure, Study, search_bits, study, ways_to_ranges

IMAGES = small.images(16)
LABELS = np.asarray(small.apply_fn(small.make_params(), IMAGES).argmax(-1))


def top1(apply_fn: Any, params: Any) -> float:
    return 100 * float(np.mean(np.asarray(apply_fn(params, IMAGES)).argmax(-1) == LABELS))


@functools.cache
def made(name: str, *widths: int) -> Study:
    network = small.apply_fn, small.make_params(), IMAGES
    return study(name, *network, top1, small.CHEAP, widths=widths)


def labels(study: Study) -> list[tuple[str, ...]]:
    return [row.labels for row in study.rows]


def test_more_bits_are_better():
    for name in ("weight-bits", "activation-bits"):
        few, many = made(name, 3, 10).rows
        assert (few.labels, many.labels) == (("3",), ("10",))
        assert many.logits_sqnr_db > few.logits_sqnr_db + 30, "6 dB per bit, 7 bits"
        assert many.agreement == 100.0 == made(name, 3, 10).float_top1


def test_weights_alone_cost_no_activations_and_the_other_way_round():
    weights, activations = made("weight-bits", 3).rows[0], made("activation-bits", 3).rows[0]
    kernels = 4 * (2 * 2 * 2 * 6 + 6 * 4)
    assert weights.bytes < kernels < activations.bytes


def test_every_granularity_and_every_symmetry():
    found = made("granularity", 4)
    assert [label[1] for label in labels(found)] == [
        *("per_tensor", "per_channel", "per_group of 64", "per_group of 16"),
    ]
    assert found.rows[1].logits_sqnr_db > found.rows[0].logits_sqnr_db
    found = made("symmetry", 4)
    assert [label[1:] for label in labels(found)] == [
        ("weights", "symmetric signed"),
        ("weights", "asymmetric"),
        ("activations", "symmetric signed"),
        ("activations", "asymmetric where a value is negative"),
        ("activations", "symmetric unsigned, signed where a value is negative"),
    ]
    signed, zero_points, unsigned = (row.logits_sqnr_db for row in found.rows[2:])
    assert zero_points > signed and unsigned >= signed - 0.5


def test_overrides_hold_in_every_case():
    base = dataclasses.replace(small.CHEAP, overrides={"head": {"bits": 8}})
    measure = Measure(small.apply_fn, small.make_params(), IMAGES, top1)
    for name, question in QUESTIONS.items():
        for _, way in question.cases(base, [4], measure.quantize):
            recipe = way if isinstance(way, Recipe) else way.recipe
            head = recipe.by_layer(["conv", "head"])["head"]
            specs = [spec for spec in (head.weights, head.inputs, head.outputs) if spec]
            assert specs and {spec.bits for spec in specs} == {8}, name


def test_positions_and_range_methods():
    found = made("output-position", 4)
    assert len(set(labels(found))) == 6
    assert [label[1] for label in labels(made("range-method", 4))] == [
        *("absmax", "percentile", "mse", "output_mse", "kl"),
    ]


def test_powers_of_two_cost_what_they_cost():
    found = made("fixed-point", 6)
    assert labels(found) == [
        ("6", tensors, scales)
        for scales in ("free", "power_of_two")
        for tensors in ("weights", "activations", "all")
    ]
    free, fixed = (
        [row.logits_sqnr_db for row in rows] for rows in (found.rows[:3], found.rows[3:])
    )
    assert all(f < g for f, g in zip(fixed, free, strict=True))
    assert found.rows[2].bytes == found.rows[5].bytes


def test_every_format_of_weights_of_the_width():
    found = made("weight-format", 3)
    names = ["uniform", "kmeans", "power_of_two", "apot", "quantile"]
    assert labels(found) == [("3", name) for name in names]
    gains = [row.logits_sqnr_db - found.rows[0].logits_sqnr_db for row in found.rows]
    assert gains[1] > 1 and max(gains) == gains[1]


def test_static_dynamic_and_weights_alone_with_images_and_without():
    found = made("dynamic", 8)
    *possible, missing, _, _ = (way.label for way in ways_to_ranges(small.CHEAP))
    assert [label[1] for label in labels(found)][: len(possible)] == possible
    assert len(found.rows) == len(ways_to_ranges(small.CHEAP)) - 1
    [refused] = found.refused
    assert refused.startswith(f"not possible: 8, {missing}") and "no batch norm" in refused
    assert refused.split()[-1] in str(found)
    by_label = {row.labels[1]: row for row in found.rows}
    weights, without = (by_label[f"{prefix}weights alone"] for prefix in ("", "no images: "))
    assert weights._replace(labels=()) == without._replace(labels=()), "absmax needs no images"
    dynamic, static = by_label["dynamic per tensor"], by_label["static, inputs"]
    assert dynamic.bytes < static.bytes, "no scale of an input"
    assert min(row.logits_sqnr_db for row in found.rows) > 25


def test_the_table_has_a_line_per_row_and_one_for_float():
    lines = str(made("weight-bits", 3, 10)).splitlines()
    assert lines[0] == QUESTIONS["weight-bits"].text
    assert len(lines) == 4 + 2 + 1
    assert lines[-1].split() == ["float", "100.00", "100.0"]
    assert max(map(len, lines)) <= 100


def test_bits_are_added_until_the_predictions_are_those_of_the_float_network():
    measure = Measure(small.apply_fn, small.make_params(), IMAGES, top1)
    q, rows = search_bits(measure, small.CHEAP, 90.0)
    assert [row.labels for row in rows] == [(str(b),) for b in range(2, 2 + len(rows))]
    assert rows[-1].agreement >= 90.0 > max((row.agreement for row in rows[:-1]), default=0.0)
    assert {record.weight_bits for record in q.report} == {int(rows[-1].labels[0])}
    assert 1 < len(rows) < 15


def test_what_is_in_float_stays_there():
    measure = Measure(small.apply_fn, small.make_params(), IMAGES, top1)
    weights_only = dataclasses.replace(small.CHEAP, inputs=None, outputs=None)
    q, _ = search_bits(measure, weights_only, 1.0)
    assert [(r.weight_bits, r.input_bits, r.output_bits) for r in q.report] == [(2, None, None)] * 2


def test_an_unknown_study_is_refused():
    with pytest.raises(ValueError, match="`name` must be one of weight-bits, .*; got 'bits'"):
        study("bits", small.apply_fn, small.make_params(), IMAGES, top1)
