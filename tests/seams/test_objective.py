"""A range objective of one's own, given in a recipe: the fourth power of the error."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QuantSpec
from qjax.objectives.base import Objective, Sample
from qjax.objectives.table import OBJECTIVES
from qjax.rounding.nearest import NEAREST


def fourth_power(sample: Sample, format: Any) -> jax.Array:
    return sample.total((format.project(sample.values) - sample.target) ** 4)


L4 = Objective("l4", "fourth power of the error", True, lambda s: s.extremes(), fourth_power)

COUNT = 25  # candidates
SHARES = np.arange(1, COUNT + 1, dtype=np.float32) / np.float32(COUNT)
RNG = np.random.default_rng(0)
X: Any = RNG.laplace(size=(64, 40)).astype(np.float32)
PARAMS = {
    "first": jnp.asarray(RNG.laplace(size=(40, 6)), jnp.float32),
    "last": jnp.asarray(RNG.laplace(size=(6, 5)), jnp.float32),
}
SPECS = {
    "symmetric": QuantSpec(4, granularity="per_tensor"),
    "asymmetric": QuantSpec(3, symmetric=False, granularity="per_tensor"),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def network(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["first"]) @ params["last"]


def quantized(method: Any, **fields: Any) -> qjax.Quantized:
    """With one tensor of every layer quantized, its range searched once over a grid."""
    none: dict[str, Any] = dict.fromkeys(("weights", "inputs", "outputs"))
    plain: dict[str, Any] = {"rounding": NEAREST, "reconstructions": 0, "sweeps": 0}
    plain |= {"bias_correction": False, "grid_size": COUNT, "refinements": 0}
    recipe = qjax.Recipe(range_method=method, **plain | none | fields)
    return qjax.quantize(network, PARAMS, X, recipe)


def loss(values: np.ndarray, scale: Any, zero_point: Any, spec: QuantSpec, power: int = 4) -> Any:
    low, high = spec.qmin - zero_point, spec.qmax - zero_point
    values = values.astype(np.float64)
    return np.sum((scale * np.clip(np.rint(values / scale), low, high) - values) ** power, axis=0)


def covering(low: Any, high: Any, spec: QuantSpec) -> tuple[Any, Any]:
    if spec.symmetric:
        return np.maximum(-low, high) / np.float32(spec.qmax), 0
    scale = (high - low) / np.float32(spec.qmax - spec.qmin)
    return scale, np.rint(-low / scale)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, symmetric=False)], ids=SPECS.keys())
def test_of_a_kernel_it_finds_the_least_loss_of_every_channel(spec: QuantSpec):
    w = np.asarray(PARAMS["first"])
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    losses = np.stack([loss(w, *covering(a * low, a * high, spec), spec) for a in SHARES])
    found = quantized(L4, weights=spec).params["layers"]["first"].weights
    own = loss(w, np.asarray(found.scale)[0, 0], np.asarray(found.zero_point)[0, 0], spec)
    np.testing.assert_allclose(own, losses.min(0), rtol=1e-4)
    assert np.any(losses.argmin(0) < COUNT - 1), "an example in which clipping pays"
    by_mse = quantized("mse", weights=spec).params["layers"]["first"].weights
    assert np.any(np.asarray(found.scale) > np.asarray(by_mse.scale)), "it minds outliers more"


def least_of_all(values: np.ndarray, spec: QuantSpec) -> float:
    """The least loss over all pairs of ends, or over the shares of a symmetric range."""
    low, high = min(values.min(), np.float32(0)), values.max()
    lows = [low] if low == 0 else [a * low for a in SHARES]
    pairs = [(b, a * high) for a in SHARES for b in lows]
    if spec.symmetric:
        pairs = [(a * low, a * high) for a in SHARES]
    return min(float(loss(values, *covering(*pair, spec), spec)) for pair in pairs)


@each_spec
def test_of_an_input_it_finds_the_least_loss(spec: QuantSpec):
    layers = quantized(L4, inputs=spec, sequential=False).params["layers"]
    hidden = np.asarray(jax.nn.relu(X @ PARAMS["first"]))
    for values, layer in ((X, layers["first"]), (hidden, layers["last"])):
        values = values.reshape(-1)
        own = loss(values, float(layer.inputs.scale), int(layer.inputs.zero_point), spec)
        # The two ends are searched in turns, which need not find the best pair of all.
        slack = 1e-4 if spec.symmetric or values.min() >= 0 else 0.03
        assert own == pytest.approx(least_of_all(values, spec), rel=slack)


@each_spec
def test_of_an_output_it_finds_the_least_loss(spec: QuantSpec):
    layers = quantized(L4, outputs=spec, sequential=False).params["layers"]
    shown = np.maximum(np.asarray(X @ PARAMS["first"]), 0)  # by the ReLU
    y = np.asarray(shown @ PARAMS["last"])
    for values, layer in ((shown, layers["first"]), (y, layers["last"])):
        values = values.reshape(-1)
        own = loss(values, float(layer.outputs.scale), int(layer.outputs.zero_point), spec)
        # Scales of outputs are rounded to 16 bits; and see above.
        assert own == pytest.approx(
            least_of_all(values, spec), rel=2e-3 if spec.symmetric else 0.03
        )


@each_spec
def test_no_other_objective_has_less_of_its_loss(spec: QuantSpec):
    def of_input(method: Any) -> float:
        layer = quantized(method, inputs=spec).params["layers"]["first"]
        values, qparams = X.reshape(-1), layer.inputs
        return float(loss(values, float(qparams.scale), int(qparams.zero_point), spec))

    own = of_input(L4)
    assert all(own <= of_input(method) * (1 + 1e-4) for method in OBJECTIVES)
    assert sum(own < of_input(method) for method in OBJECTIVES) > 2


def test_json_names_it(monkeypatch: pytest.MonkeyPatch):
    recipe = qjax.recipe(4, range_method=L4)
    fields = json.loads(json.dumps(recipe.to_json()))
    assert fields["range_method"] == "l4"
    with pytest.raises(ValueError, match="`range_method` must be one of absmax, .*; got 'l4'"):
        qjax.Recipe.from_json(fields)
    monkeypatch.setitem(OBJECTIVES, L4.name, L4)
    again = qjax.Recipe.from_json(fields)
    assert again.objective is L4 and again.to_json() == fields


def test_per_channel_activations_take_it():
    spec = QuantSpec(4, symmetric=False, granularity="per_channel")
    layer = quantized(L4, inputs=spec).params["layers"]["last"]
    assert layer.inputs.scale.shape == (1, 6)
    rugged = L4._replace(per_channel=False)
    with pytest.raises(ValueError, match="`inputs` per channel needs the range_method .* got l4"):
        qjax.Recipe(inputs=spec, range_method=rugged)
