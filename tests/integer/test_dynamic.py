"""Layers that find the range of their input at run time: on integers as in fake quantization."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

import qjax
from qjax import QuantSpec
from qjax.integer.lowerings import LOWERINGS
from qjax.run.layer import apply_layer, at_input

CASES = {case.id: case for case in models.CASES}


def spec(granularity: Any, **fields: Any) -> QuantSpec:
    return QuantSpec(8, False, granularity, ranges="dynamic", **fields)


STATIC = QuantSpec(8, False, "per_tensor")
FORMATS: dict[str, dict[str, Any]] = {
    "inputs": {"inputs": spec("per_tensor"), "outputs": None},
    "per_example": {"inputs": spec("per_example"), "outputs": None},
    "static_outputs": {"inputs": spec("per_example"), "outputs": STATIC},
    "all": {"inputs": spec("per_example"), "outputs": spec("per_example")},
    "outputs": {"inputs": STATIC, "outputs": spec("per_tensor")},
    "activated": {
        "inputs": spec("per_tensor"),
        "outputs": spec("per_example"),
        "output_position": "post_activation",
    },
}


@functools.cache
def quantized(id: str, formats: str) -> qjax.Quantized:
    case = CASES[id]
    recipe = dataclasses.replace(qjax.recipe(8).naive(), **FORMATS[formats])
    return qjax.quantize(case.apply_fn, case.params, case.x, recipe)


@pytest.mark.parametrize(
    ("id", "formats"),
    [*(("plain_nchw", name) for name in FORMATS), ("linen_mobilenet", "static_outputs")],
)
def test_integers_give_what_fake_quantization_gives(id: str, formats: str):
    q, x = quantized(id, formats), CASES[id].x
    for lowering in (None, *(LOWERINGS.keys() - {"pairs"})):  # which no dense layer has
        run = qjax.integer(q, lowering=lowering)
        np.testing.assert_array_equal(run(q.params, x), q.apply_fn(q.params, x))
        expected, found = q.apply_fn.codes(q.params, x), run.codes(q.params, x)
        chex.assert_trees_all_equal(found, expected, strict=True)
        assert set(found) == (set(q.params["layers"]) if formats == "static_outputs" else set())


@pytest.mark.parametrize("id", ["plain_nchw", "linen_resnet"])
def test_an_example_does_not_depend_on_the_others(id: str):
    q, x = quantized(id, "all"), CASES[id].x
    scale = jnp.float32([1.0, 100.0, 0.01, 3.0]).reshape(-1, *[1] * (x.ndim - 1))
    x = x[:4] * scale
    together = q.apply_fn(q.params, x)
    alone = [q.apply_fn(q.params, x[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(together, jnp.stack(alone))
    y, y_hat = CASES[id].apply_fn(CASES[id].params, x), together
    for exact, rounded in zip(y, y_hat, strict=True):
        assert float(qjax.sqnr_db(exact, rounded)) > 25, "whatever the scale of the example"


def test_a_layer_is_the_static_one_with_the_range_of_its_input():
    case = CASES["plain_nchw"]
    q = quantized("plain_nchw", "inputs")
    [site, *_] = q.apply_fn.network(case.x).sites
    operation, layer = site.layer.operation, q.params["layers"][site.layer.name]
    assert not layer.has_integer_accumulator and layer.bias.dtype == jnp.float32
    found = at_input(operation, layer, case.x)
    assert found.has_integer_accumulator
    low, high = float(case.x.min()), float(case.x.max())
    np.testing.assert_allclose(found.inputs.scale, (high - low) / 255, rtol=2**-15)
    np.testing.assert_array_equal(found.bias, np.rint(found.bias))
    unit = np.asarray(layer.weights.scale[0, 0] * found.inputs.scale)
    assert np.all(np.abs(found.bias * unit - layer.bias) <= unit / 2 * (1 + 1e-5))
    expected = apply_layer(operation, found, case.x)
    np.testing.assert_array_equal(apply_layer(operation, layer, case.x), expected)


def test_a_dark_example_keeps_the_bias():
    """At the scale of a tiny input a bias is beyond int32."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"] + params["b"]

    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(6, 4))), "b": jnp.full((1, 4), 3.0)}
    x = jnp.float32(rng.normal(size=(8, 6)))
    q = qjax.quantize(apply_fn, params, x, qjax.recipe(8, activation_ranges="dynamic").naive())
    dark = 1e-9 * x
    np.testing.assert_allclose(q.apply_fn(q.params, dark), 3.0, rtol=1e-6)
    np.testing.assert_array_equal(qjax.integer(q)(q.params, dark), q.apply_fn(q.params, dark))


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_weights_of_any_granularity_go_with_it(granularity: Any):
    case = CASES["plain_nchw"]
    recipe = qjax.recipe(8, activation_ranges="dynamic", rounding="nearest", grid_size=4)
    weights = QuantSpec(8, granularity=granularity, group_size=4)
    q = qjax.quantize(
        case.apply_fn, case.params, case.x, dataclasses.replace(recipe, weights=weights)
    )
    y = case.apply_fn(case.params, case.x)
    assert float(qjax.sqnr_db(y, q.apply_fn(q.params, case.x))) > 35
    run = qjax.integer(q)
    np.testing.assert_array_equal(run(q.params, case.x), q.apply_fn(q.params, case.x))
    assert bool(run.lowerings(case.x)) == (granularity == "per_channel")


def test_what_needs_ranges_beforehand_is_refused():
    q = quantized("plain_nchw", "inputs")
    name = next(iter(q.params["layers"]))
    with pytest.raises(ValueError, match=f"`arithmetic` shift needs .* layer '{name}' finds that "):
        qjax.integer(q, arithmetic="shift")
    with pytest.raises(ValueError, match="that of its output at run time; use float, or quantize"):
        qjax.integer(quantized("plain_nchw", "outputs"), arithmetic="fixed_point")
    with pytest.raises(ValueError, match=f"`accumulator` cannot be simulated for layer '{name}'"):
        qjax.integer(q, accumulator=qjax.Accumulator(16, "wrap"))
    assert qjax.integer(q).accumulators(q.params, CASES["plain_nchw"].x) == {}
