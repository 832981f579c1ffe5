"""What is measured on a quantized network, against sums done by hand."""

import math

import pytest
import small

from qjax.study.quality import quality
from qjax.study.sensitivity import logits_sqnr_alone


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
    alone = logits_sqnr_alone(q, small.make_params(), x)
    assert alone["head"] > 100, "float rounding only"
    assert alone["conv"] == pytest.approx(found.logits, abs=1e-2), "the only layer there is"
