"""What is measured on a quantized network, against sums done by hand."""

import math

import numpy as np
import pytest
import small

from qjax.study.quality import compare, predict, quality, sensitivity, wilson_interval


def test_predictions_of_all_images_in_order():
    x = small.images(10)
    params = small.make_params()
    expected = small.apply_fn(params, x)
    for size in (3, 10, 64):
        logits = predict(small.apply_fn, params, x, batch_size=size)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_two_networks_compared_by_hand():
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    before = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 0, 1, 1]]  # 6 of 8 right
    after = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 2, 2, 1, 1]]  # 5 of 8: two lost, one gained
    found = compare(before, after * 2, labels)
    assert (found.images, found.float_top1, found.quantized_top1) == (8, 75.0, 62.5)
    assert (found.difference, found.agreement) == (-12.5, 62.5)
    deviation = 100 * math.sqrt(3 - 1 / 8) / 8
    low, high = found.difference_interval
    assert (high - low) / 2 == pytest.approx(1.959964 * deviation)
    assert (high + low) / 2 == pytest.approx(-12.5)
    assert found.confusion.tolist() == [[1, 1, 1], [0, 3, 1], [0, 0, 1]]
    assert set(found.worst[:3]) == {3, 4, 5}, "changed predictions first"
    np.testing.assert_array_equal(found.quantized_predictions, after.argmax(-1))


def test_intervals_are_wilsons():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 27.753), abs=1e-3)
    assert wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=1e-2)
    low, high = wilson_interval(500, 500)
    assert high == 100.0 and 99 < low < 100


def test_quality_is_that_of_the_report_where_they_measure_the_same():
    q, params = small.quantized(), small.make_params()
    found = quality(q, params, small.images())
    for layer, record in zip(found.layers, q.report, strict=True):
        assert layer.name == record.name
        assert layer.weights == pytest.approx(record.weight_sqnr_db, abs=1e-3)
        assert 20 < layer.inputs < 70 and 20 < layer.outputs < 70
        for histogram in layer.histograms.values():
            assert histogram.clip is not None and sum(histogram.counts) > 0
    # Fitted on the float input, the report measures a layer alone; here the others are rounded too.
    assert found.layers[0].accumulated == pytest.approx(q.report[0].output_sqnr_db, abs=1e-3)
    assert found.layers[1].accumulated == pytest.approx(found.logits, abs=1e-3)


def test_a_layer_in_float_is_exact_and_not_sensitive():
    q = small.quantized(
        overrides=(("head", (("weights", None), ("inputs", None), ("outputs", None))),)
    )
    x = small.images()
    found = quality(q, small.make_params(), x)
    head = found.layers[1]
    assert (head.weights, head.inputs, head.outputs) == (math.inf,) * 3
    assert head.histograms["weights"].clip is None
    alone = sensitivity(q, small.make_params(), x)
    assert alone["head"] > 100, "float rounding only"
    assert alone["conv"] == pytest.approx(found.logits, abs=1e-2), "the only layer there is"
