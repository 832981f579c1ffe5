"""The explanation of a layer: its numbers are those of integer arithmetic done by hand."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import small

import qjax
from qjax.study.explain import STEPS, Explanation
from qjax.study.layer_trace import measure_layer


def steps(explanation: Explanation) -> dict[str, Any]:
    return {step.name: step for step in explanation.steps}


def test_every_number_is_that_of_integer_arithmetic():
    q = small.quantized()
    x = small.images()[:1]
    explanation = qjax.explain(q, "conv", x, small.make_params())
    found = steps(explanation)
    assert explanation.patch == len(explanation.elements) == 8, "the whole patch is shown"
    layer = q.params["layers"]["conv"]
    s_x, z_x = float(layer.inputs.scale), int(layer.inputs.zero_point)
    row, column = divmod(explanation.position, 3)
    patch = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
    q_x = np.clip(np.rint(patch / s_x) + z_x, 0, 255).astype(np.int64)
    q_w = np.asarray(layer.kernel, np.int64)[0, :, explanation.channel]
    products = q_w * (q_x - z_x)
    q_b = int(layer.bias[explanation.channel])
    assert found["input"].values == pytest.approx(patch)
    assert found["input codes"].values == tuple(q_x)
    assert found["kernel codes"].values == tuple(q_w)
    assert found["products"].values == tuple(products)
    assert found["accumulator"].values == (products.sum(),)
    assert found["bias"].values == (products.sum() + q_b,)
    s_w = float(layer.weights.scale[0, 0, explanation.channel])
    s_y, z_y = float(layer.outputs.scale), int(layer.outputs.zero_point)
    code = np.rint((products.sum() + q_b) * (s_w * s_x / s_y))
    assert found["requantization"].values == (code,)
    assert found["zero point and clamp"].values == (np.clip(code + z_y, 0, 255),)
    assert "equal to the network's own code in 100.00%" in found["zero point and clamp"].note
    z = jax.nn.relu((np.clip(code + z_y, 0, 255) - z_y) * s_y)
    assert found["de-quantization"].values == pytest.approx((float(z),))


def test_the_bits_are_those_that_the_worst_input_needs():
    q = small.quantized()
    found = steps(qjax.explain(q, "conv", small.images()[:1]))
    layer = q.params["layers"]["conv"]
    codes = np.asarray(layer.kernel, np.int64)[0]
    ends = np.array([0, 255]) - int(layer.inputs.zero_point)
    worst = max(
        np.abs(np.where(codes > 0, codes * a, codes * b).sum(0)).max()
        for a, b in (ends, ends[::-1])
    )
    width = next(b for b in range(1, 40) if worst < 2 ** (b - 1))
    assert f"{width} bits needed for any input" in found["accumulator"].note
    largest = np.abs(codes).max() * np.abs(ends).max()
    assert found["products"].bits == next(b for b in range(1, 40) if largest < 2 ** (b - 1))


def test_errors_are_against_the_float_network():
    q, x, params = small.quantized(), small.images()[:2], small.make_params()
    found = steps(qjax.explain(q, "conv", x, params))
    kernel = q.params["layers"]["conv"]
    kernel_hat = np.asarray(kernel.kernel, np.float64)[0] * np.asarray(kernel.weights.scale)[0]
    w = np.asarray(params["conv"]["w"], np.float64).reshape(8, 6)
    expected = 10 * np.log10(np.sum(w**2) / np.sum((w - kernel_hat) ** 2))
    assert found["kernel codes"].sqnr_db == pytest.approx(expected, abs=1e-3)
    assert found["input"].sqnr_db == np.inf, "no layer stands before it"
    assert 25 < found["de-quantization"].sqnr_db < 60
    without = steps(qjax.explain(q, "conv", x))
    assert "kernel" not in without and without["kernel codes"].sqnr_db is None


def test_the_text_is_narrow_and_in_order():
    lines = str(qjax.explain(small.quantized(), "conv", small.images()[:1])).splitlines()
    assert max(map(len, lines)) <= 100
    numbered = [line[:2] for line in lines if line[:2].strip().isdigit()]
    assert numbered == [f"{i:2}" for i in range(1, len(numbered) + 1)]
    assert lines[0] == "conv: conv 2×2×2×6, activation relu"


FORMS: dict[str, dict[str, Any]] = {
    "float weights": {"weights": None},
    "float inputs": {"inputs": None},
    "float outputs": {"outputs": None},
    "per group": {"weights": qjax.QuantSpec(granularity="per_group", group_size=4)},
    "after": {"output_position": "post_activation"},
    "both": {"output_position": "both"},
    "symmetric outputs": {"outputs": qjax.QuantSpec(6, granularity="per_tensor")},
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("layer", ["conv", "head"])
def test_the_last_value_is_the_networks(layer: str, changes: dict[str, Any]):
    q = small.quantized(**changes)
    x = small.images()[:1]
    explanation = qjax.explain(q, layer, x, small.make_params())
    if layer == "head":
        expected = q.apply_fn(q.params, x)[0, explanation.channel]
    else:
        identity = dataclasses.replace(q.apply_fn, apply_fn=_activations)
        outputs = identity(q.params, x).reshape(-1, 6)
        expected = outputs[explanation.position, explanation.channel]
    np.testing.assert_allclose(explanation.steps[-1].values[0], expected, rtol=1e-5)


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_no_step_depends_on_another(changes: dict[str, Any]):
    q, x = small.quantized(**changes), small.images()[:1]
    trace = measure_layer(q, "conv", x)
    backwards = [make(trace) for make in reversed(STEPS)][::-1]
    made = tuple(step for step in backwards if step is not None)
    assert made == qjax.explain(q, "conv", x).steps
    arrays = [leaf for leaf in jax.tree.leaves(vars(trace)) if isinstance(leaf, np.ndarray)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float64), np.dtype(np.int64)}


def _activations(params: Any, x: jax.Array) -> jax.Array:
    """The activations of the small network; the head is kept so that its layers are the same."""
    kernel, bias = params["conv"]["w"], params["conv"]["b"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dimensions)
    y = jax.nn.relu(y + bias)
    return y + 0 * jnp.sum(y.mean((1, 2)) @ params["head"]["w"])


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="`layer` must be one of conv, head; got 'stem'"):
        qjax.explain(small.quantized(), "stem", small.images()[:1])


@pytest.mark.parametrize("id", ["activations", "grouped_dense", "haiku_cnn"])
def test_every_kind_of_layer_is_explained(id: str):
    case: Any = next(case for case in models.CASES if case.id == id)
    q = qjax.quantize(case.apply_fn, case.params, case.x, small.CHEAP)
    for record in q.report:
        explanation = qjax.explain(q, record.name, case.x, case.params)
        assert max(map(len, str(explanation).splitlines())) <= 100
        errors = [step.sqnr_db for step in explanation.steps if step.sqnr_db is not None]
        assert min(errors) > 15, f"{record.name}: every step is near the float network's"
        codes = steps(explanation)["zero point and clamp"].note
        assert "equal to the network's own code in 100.00%" in codes or "not compared" in codes


def test_fixed_point_names_its_formats_and_its_shifts():
    q = small.quantized(fixed_point=True)
    layer = q.params["layers"]["conv"]
    found = steps(qjax.explain(q, "conv", small.images()[:1], small.make_params()))
    n = -int(np.log2(layer.inputs.scale))
    assert found["input codes"].note.endswith(f"\nfixed point: Q{7 - n}.{n}")
    fractions = sorted({-int(np.log2(s)) for s in layer.weights.scale.reshape(-1)}, reverse=True)
    formats = ", ".join(f"Q{7 - n}.{n}" for n in fractions)
    assert found["kernel codes"].note.endswith(f"\nfixed point: {formats}")
    assert "\nfixed point: " in found["zero point and clamp"].note
    assert "equal to the network's own code in 100.00%" in found["zero point and clamp"].note
    assert found["requantization"].note.endswith(": a shift, and no product")
    free = steps(qjax.explain(small.quantized(), "conv", small.images()[:1], small.make_params()))
    assert not any("fixed point" in step.note for step in free.values())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_example"])
def test_a_range_at_run_time_is_that_of_the_input(granularity: str):
    formats = {"activation_ranges": "dynamic", "activation_granularity": granularity}
    q, x = small.quantized(**formats, output_bits=8), small.images()
    found = steps(qjax.explain(q, "conv", x[:1], small.make_params()))
    low, high = min(x[0].min(), 0), max(x[0].max(), 0)
    scale = float(re.findall(r"x / ([0-9.e-]+)\)", found["input codes"].equation)[0])
    assert scale == pytest.approx((high - low) / 255, rel=1e-4)
    assert "the range is that of this input, found at run time" in found["input codes"].note
    assert found["accumulator"].number == "int32"
    assert "equal to the network's own code in 100.00%" in found["zero point and clamp"].note
    if granularity == "per_example":
        with pytest.raises(ValueError, match="`x` must hold one example, .* 'conv'; got 2"):
            qjax.explain(q, "conv", x[:2], small.make_params())
