"""A rounding of one's own, given in a recipe: stochastic rounding."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats.base import elementwise
from qjax.rounding.base import Problem, Rounding
from qjax.rounding.table import ROUNDINGS


def round_stochastically(problem: Problem) -> tuple[jax.Array, Any]:
    """Rounds up with the probability of what rounding down leaves: E[ŵ] = w."""
    kernel, format = problem.kernel, elementwise(problem.format, problem.kernel.shape[1])
    noise = jax.random.uniform(jax.random.key(0), kernel.shape, minval=-0.5, maxval=0.5)
    return format.encode(kernel + noise * format.step), problem.format


STOCHASTIC = Rounding("stochastic", frozenset(), round_stochastically)

RNG = np.random.default_rng(0)
SIZE = 96
PARAMS = {
    "first": jnp.asarray(RNG.normal(size=(SIZE, SIZE)), jnp.float32),
    "last": jnp.asarray(RNG.normal(size=(SIZE, 4)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(8, SIZE)), jnp.float32)


def network(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["first"]) @ params["last"]


def recipe(bits: int = 4, **fields: Any) -> qjax.Recipe:
    """Kernels are rounded as they are: nothing is refitted, and nothing clipped."""
    plain = {"range_method": "absmax", "reconstructions": 0, "sweeps": 0, "bias_correction": False}
    return qjax.recipe(bits, inputs=None, outputs=None, **plain | fields)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_codes_lie_on_the_grid_and_are_right_on_average(granularity: Any):
    spec = qjax.QuantSpec(4, granularity=granularity, group_size=24)
    q = qjax.quantize(network, PARAMS, X, recipe(weights=spec, rounding=STOCHASTIC))
    layer = q.params["layers"]["first"]
    w = np.asarray(PARAMS["first"], np.float64)
    blocks = layer.weights.scale.shape[1]
    scale = np.repeat(np.asarray(layer.weights.scale, np.float64)[0], SIZE // blocks, axis=0)
    codes = np.asarray(layer.kernel)
    assert codes.dtype == np.int8 and np.abs(codes).max() == 7
    exact = w / scale
    error = codes[0] - exact
    assert np.abs(error).max() < 1 + 1e-4, "one of the two codes next to the value"
    assert np.mean(np.abs(error) > 0.5 + 1e-4) > 0.1, "not always the nearer one"
    fraction = exact - np.floor(exact)
    deviation = np.sqrt(np.sum(fraction * (1 - fraction))) / w.size
    assert abs(error.mean()) < 4 * deviation
    # So it is wherever between two codes a value lies; rounding to nearest is off there.
    for low in (0.1, 0.6):
        part = (fraction > low) & (fraction < low + 0.3)
        deviation = np.sqrt(np.sum((fraction * (1 - fraction))[part])) / part.sum()
        assert abs(error[part].mean()) < 4 * deviation
        assert abs((np.rint(exact) - exact)[part].mean()) > 4 * deviation


def test_all_else_works_with_it():
    q = qjax.quantize(network, PARAMS, X, recipe(8, rounding=STOCHASTIC))
    y = network(PARAMS, X)
    assert float(qjax.sqnr_db(y, q.apply_fn(q.params, X))) > 30
    packed = qjax.unpack(qjax.pack(q.params))
    np.testing.assert_array_equal(q.apply_fn(packed, X), q.apply_fn(q.params, X))


def test_the_report_and_json_name_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    wanted = recipe(8, rounding=STOCHASTIC, overrides={"last": {"rounding": STOCHASTIC}})
    q = qjax.quantize(network, PARAMS, X, wanted)
    assert q.report.recipe.round_with.name == "stochastic"
    fields = json.loads(json.dumps(q.report.recipe.to_json()))
    assert fields["rounding"] == "stochastic"
    assert fields["overrides"] == [["last", {"rounding": "stochastic"}]]
    qjax.save(tmp_path / "model", q)
    with pytest.raises(ValueError, match="`rounding` must be one of nearest, gptq; got 'stoch"):
        qjax.load(tmp_path / "model", network)
    monkeypatch.setitem(ROUNDINGS, STOCHASTIC.name, STOCHASTIC)
    again = qjax.load(tmp_path / "model", network)
    assert again.report.recipe.round_with is STOCHASTIC
    assert again.report.recipe.to_json() == fields
    np.testing.assert_array_equal(again.apply_fn(again.params, X), q.apply_fn(q.params, X))


def test_in_the_table_its_name_is_enough(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="`rounding` must be one of nearest, gptq"):
        recipe(rounding="stochastic")
    monkeypatch.setitem(ROUNDINGS, STOCHASTIC.name, STOCHASTIC)
    by_name, by_value = (
        qjax.quantize(network, PARAMS, X, recipe(rounding=rounding))
        for rounding in ("stochastic", STOCHASTIC)
    )
    for layer, other in zip(
        *(q.params["layers"].values() for q in (by_name, by_value)), strict=True
    ):
        np.testing.assert_array_equal(layer.kernel, other.kernel)
