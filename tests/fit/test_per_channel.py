"""Scales per channel of inputs and outputs: what has them, that they help, that all takes them."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

import qjax
from qjax.fit.samples import OutputSample
from qjax.fit.search import CANDIDATES, least, least_by_channel
from qjax.graph.activation import RELU
from qjax.graph.operation import along_axes, by_channel
from qjax.objectives.errors import OUTPUT_MSE
from qjax.run.layer import apply_linear, dequantized_kernel
from qjax.study.quality import quality

RNG = np.random.default_rng(0)
CHANNELS = 16
SPREAD = np.float32(2.0) ** np.arange(-4, 4).repeat(2)  # what one channel carries more than another
X: Any = RNG.normal(size=(400, CHANNELS)).astype(np.float32)
CHEAP = {"rounding": "nearest", "reconstructions": 0, "sweeps": 0, "grid_size": 16}
NAMES = ("stem", "up", "down", "head")


def make_params() -> Any:
    """Kernels of one shape, so that a recipe compiles for one layer."""
    draw = RNG.normal
    params = {name: draw(size=(CHANNELS, CHANNELS)) / np.sqrt(CHANNELS) for name in NAMES}
    params["stem"] *= SPREAD
    params["down"] *= SPREAD
    params["up"] /= SPREAD[:, None]
    params["head"] /= SPREAD[:, None]
    return jax.tree.map(jnp.float32, params)


PARAMS = make_params()


def residual(params: Any, x: jax.Array) -> jax.Array:
    """A residual block between two dense layers."""
    x = jax.nn.relu(x @ params["stem"])
    x = jax.nn.relu(x + jax.nn.relu(x @ params["up"]) @ params["down"])
    return x @ params["head"]


@functools.cache
def quantized(granularity: Any, **fields: Any) -> qjax.Quantized:
    recipe = qjax.recipe(6, activation_granularity=granularity, **CHEAP | fields)
    return qjax.quantize(residual, PARAMS, X, recipe)


def noise_db(q: qjax.Quantized) -> float:
    return float(qjax.sqnr_db(residual(PARAMS, X), q.apply_fn(q.params, X)))


def shapes(q: qjax.Quantized, field: str) -> dict[str, tuple[int, ...]]:
    return {n: getattr(layer, field).scale.shape for n, layer in q.params["layers"].items()}


def test_a_sum_and_inputs_above_0_have_scales_per_channel():
    q = quantized("per_channel")
    per_channel = (1, CHANNELS)
    # up reads the codes of stem, down those of up; the input of the network has negative values
    assert shapes(q, "inputs") == dict(zip(NAMES, [(), (), (), per_channel], strict=True))
    assert shapes(q, "outputs") == dict(zip(NAMES, [(), (), per_channel, ()], strict=True))
    layers = q.params["layers"]
    assert int(layers["head"].inputs.zero_point) == 0
    assert len(np.unique(layers["down"].outputs.zero_point)) > 1
    free = quantized("per_channel", outputs=None)
    assert shapes(free, "inputs") == dict(
        zip(NAMES, [(), per_channel, per_channel, per_channel], strict=True)
    )


@pytest.mark.parametrize(
    ("fields", "gain"),
    [
        ({}, 0.5),
        ({"outputs": None}, 3),
        ({"outputs": None, "range_method": "absmax"}, 3),
    ],
)
def test_they_help_where_channels_differ(fields: dict[str, Any], gain: float):
    finer, coarser = (noise_db(quantized(g, **fields)) for g in ("per_channel", "per_tensor"))
    assert finer > coarser + gain


def test_the_kernel_is_that_of_the_input_codes():
    q = quantized("per_channel", outputs=None)
    layer = q.params["layers"]["head"]
    x = np.abs(X[:, :1]) * SPREAD
    scale = np.asarray(layer.inputs.scale)
    codes = np.clip(np.rint(x / scale), 0, 63)
    kernel_codes = np.asarray(layer.kernel, np.float64)[0]
    y = (codes @ kernel_codes + np.asarray(layer.bias)) * np.asarray(layer.weights.scale)[0]
    operation = qjax.trace(residual, PARAMS, X)[3].operation
    kernel = np.asarray(dequantized_kernel(operation, layer), np.float64)[0]
    bias = np.asarray(layer.bias) * np.asarray(layer.weights.scale)[0, 0]
    np.testing.assert_allclose(apply_linear(operation, layer, x), y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose((codes * scale) @ kernel + bias, y, rtol=1e-4, atol=1e-6)
    assert float(qjax.sqnr_db(PARAMS["head"], jnp.float32(kernel))) > 20


def test_a_channel_is_searched_like_a_tensor():
    z = (RNG.normal(size=(3, 500)) * [[0.1], [1.0], [7.0]]).astype(np.float32)
    z_hat, added = z + np.float32(0.05), RNG.normal(size=z.shape).astype(np.float32)
    spec = qjax.QuantSpec(3, symmetric=False, granularity="per_channel")
    found = least_by_channel(OUTPUT_MSE, z, z_hat, added, spec, RELU, CANDIDATES)
    for row in range(3):
        extremes = z_hat[row].min(), z_hat[row].max()
        rows = z[row], z_hat[row], added[row]
        sample = OutputSample(z_hat[row][None], *extremes, *rows, RELU)
        one = least(OUTPUT_MSE, sample, spec, CANDIDATES)
        np.testing.assert_allclose(found.scale[row], one.scale, rtol=1e-6)
        assert found.zero_point[row] == one.zero_point


def test_vectors_and_channels_meet():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for axes in ((1,), (-1,), (2, 0), (0, 2)):
        channels = by_channel(axes, x)
        shaped = along_axes(axes, channels[:, 0], x)
        np.testing.assert_array_equal(by_channel(axes, x - shaped)[:, 0], 0)


# ---- On every kind of network


@pytest.mark.parametrize(("id", "has_sums"), [("linen_mobilenet", True), ("grouped_dense", False)])
def test_networks_of_every_kind_take_them(id: str, has_sums: bool):
    case = next(case for case in models.CASES if case.id == id)
    recipe = qjax.recipe(8, activation_granularity="per_channel").naive()
    q = qjax.quantize(case.apply_fn, case.params, case.x, recipe)
    layers = q.params["layers"].values()
    has_any = any(layer.inputs.scale.ndim or layer.outputs.scale.ndim for layer in layers)
    assert has_any == has_sums, "elsewhere every input is the codes of an output"
    y = case.apply_fn(case.params, case.x)
    assert float(qjax.sqnr_db(y, q.apply_fn(q.params, case.x))) > 20
    fake = q.apply_fn.codes(q.params, case.x)
    shares: dict[Any, float] = {"float": 1e-4, "fixed_point": 5e-3}
    for arithmetic, share in shares.items():
        found = qjax.integer(q, arithmetic=arithmetic).codes(q.params, case.x)
        off = [np.abs(np.asarray(found[k], np.int64) - np.asarray(fake[k], np.int64)) for k in fake]
        assert sum(int(np.sum(d > 0)) for d in off) <= share * sum(d.size for d in off)
        assert max(int(d.max()) for d in off) <= 2


@pytest.mark.parametrize("arithmetic", ["float", "fixed_point"])
def test_a_residual_sum_of_integers(arithmetic: Any):
    q = quantized("per_channel")
    y = qjax.integer(q, arithmetic=arithmetic)(q.params, X)
    least = {"float": 60, "fixed_point": 35}[arithmetic]
    assert float(qjax.sqnr_db(q.apply_fn(q.params, X), y)) > least


def test_artifacts_hold_them(tmp_path: Path):
    q = quantized("per_channel")
    qjax.save(tmp_path / "model", q)
    again = qjax.load(tmp_path / "model", residual)
    np.testing.assert_array_equal(again.apply_fn(again.params, X), q.apply_fn(q.params, X))
    packed = qjax.unpack(qjax.pack(q.params))
    np.testing.assert_array_equal(q.apply_fn(packed, X), q.apply_fn(q.params, X))


@pytest.mark.parametrize("layer", ["down", "head"])
def test_a_layer_is_explained(layer: str):
    q = quantized("per_channel")
    explanation = qjax.explain(q, layer, X[:2])
    found: dict[str, Any] = {step.name: step for step in explanation.steps}
    assert max(map(len, str(explanation).splitlines())) <= 100
    assert "equal to the network's own code in 100.00%" in found["zero point and clamp"].note
    assert found["zero point and clamp"].sqnr_db > 15, "against the same layer without rounding"
    assert ("folded into the kernel" in found["input codes"].note) == (layer == "head")


def test_layers_are_measured_in_the_units_of_their_codes():
    q = quantized("per_channel")
    *_, head = quality(q, PARAMS, X).layers
    assert min(head.weights, head.inputs, head.outputs) > 20
