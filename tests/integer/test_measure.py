"""Lowerings that are measured: exact ones, once per machine, kept whole."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import lowerings
from qjax.integer.lowerings import LOWERINGS

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "conv": jax.random.normal(KEYS[0], (3, 3, 3, 4)),
    "head": jax.random.normal(KEYS[1], (4, 5)),
}
X = jax.random.normal(KEYS[2], (2, 6, 6, 3))


def apply_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return jax.nn.relu(x).mean((1, 2)) @ params["head"]


@pytest.fixture(scope="module")
def q() -> qjax.Quantized:
    return qjax.quantize(apply_fn, PARAMS, X, qjax.recipe(8).naive())


def test_what_is_measured_is_taken_and_changes_no_result(q: qjax.Quantized, tmp_path: Path):
    fastest = qjax.lowerings.measure(q, X, folder=tmp_path)
    assert set(fastest) == {"conv", "head"} and set(fastest.values()) <= set(LOWERINGS)
    run = qjax.integer(q, lowering=fastest)
    assert {name: chosen.method.name for name, chosen in run.lowerings(X).items()} == fastest
    np.testing.assert_array_equal(run(q.params, X), q.apply_fn(q.params, X))


def test_it_is_measured_once(q: qjax.Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lowerings.measure(q, X, folder=tmp_path / "new")
    [file] = (tmp_path / "new").iterdir()
    kept = json.loads(file.read_text())
    for times in kept[lowerings._machine()].values():
        times["dot"] = -1.0
    file.write_text(json.dumps(kept))
    monkeypatch.setattr(lowerings, "_time", None)
    assert set(lowerings.measure(q, X, folder=tmp_path / "new").values()) == {"dot"}


def test_another_batch_is_measured_too(q: qjax.Quantized, tmp_path: Path):
    for x in (X, X[:1], X):
        lowerings.measure(q, x, folder=tmp_path)
    [file] = tmp_path.iterdir()
    [measured] = json.loads(file.read_text()).values()
    assert len(measured) == 4


def test_a_damaged_file_is_measured_again(q: qjax.Quantized, tmp_path: Path):
    file = tmp_path / "lowerings.json"
    file.write_text("{")
    assert set(lowerings.measure(q, X, folder=tmp_path)) == {"conv", "head"}
    assert set(json.loads(file.read_text())) == {lowerings._machine()}


def test_layers_in_float_are_left_out(tmp_path: Path):
    recipe = qjax.Recipe(overrides={"@first": {"weights": None}}).naive()
    q = qjax.quantize(apply_fn, PARAMS, X, recipe)
    assert set(lowerings.measure(q, jnp.zeros((1, 6, 6, 3)), folder=tmp_path)) == {"head"}
