"""Sums, concatenations and pools on grids of their own."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.fit.junction import fit_junction
from qjax.graph.activation import RELU
from qjax.graph.junctions import find_junctions
from qjax.graph.schedule import schedule
from qjax.run.fake import FAKE
from qjax.run.function import bind
from qjax.run.interpreter import evaluate

NAMES = ["b/sum", "b/pool", "d/concat"]


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["stem"])
    x = jax.nn.relu(x + jax.nn.relu(x @ params["a"]) @ params["b"])
    pool = x.reshape(-1, 4, 2).mean(1)
    return jnp.concatenate([pool, x @ params["d"]], 1) @ params["head"]


def make_params() -> Any:
    shapes = {"stem": (6, 8), "a": (8, 8), "b": (8, 8), "d": (8, 4), "head": (6, 3)}
    rng = np.random.default_rng(0)
    return {name: jnp.float32(rng.normal(size=shape) / 2) for name, shape in shapes.items()}


X = jnp.float32(np.random.default_rng(1).normal(size=(512, 6)))
QUANTIZED = dataclasses.replace(small.CHEAP, sums="quantized")


@functools.cache
def quantized(recipe: qjax.Recipe = QUANTIZED) -> qjax.Quantized:
    return qjax.quantize(apply_fn, make_params(), X, recipe)


def test_the_default_leaves_them_in_float():
    q = quantized(small.CHEAP)
    assert set(q.params) == {"layers", "rest"} and q.report.sums == ()


def test_values_lie_on_their_grids():
    q = quantized()
    assert set(q.params["sums"]) == set(NAMES)
    network = q.apply_fn.network(X)
    steps, env = schedule(network, find_junctions(network)), bind(network, q.params, X)
    evaluate(steps, env, q.params["layers"] | q.params["sums"], FAKE)
    for junction in find_junctions(network):
        grid, values = q.params["sums"][junction.name], env[junction.var]
        np.testing.assert_array_equal(grid.decode(grid.encode(values)), values)
        assert len(np.unique(values)) > 30
    assert int(q.params["sums"]["b/sum"].zero_point) == 0, "the ReLU hides what is below 0"
    low, high = (float(end) for end in q.params["sums"]["d/concat"].range)
    assert low < 0 < high


def test_layers_read_the_codes_of_sums():
    layers, grids = quantized().params["layers"], quantized().params["sums"]
    chex.assert_trees_all_equal(layers["d"].inputs, grids["b/sum"])
    chex.assert_trees_all_equal(layers["head"].inputs, grids["d/concat"])


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_give_what_fake_quantization_gives(bits: int):
    q = quantized(dataclasses.replace(qjax.recipe(bits).naive(), sums="quantized"))
    expected = q.apply_fn(q.params, X)
    np.testing.assert_array_equal(qjax.integer(q)(q.params, X), expected)
    if bits == 8:
        found = qjax.integer(q, arithmetic="fixed_point")(q.params, X)
        assert float(qjax.sqnr_db(expected, found)) > 40


def test_the_error_is_that_of_eight_bits():
    y = apply_fn(make_params(), X)
    errors = {}
    for recipe in (small.CHEAP, QUANTIZED):
        q = quantized(recipe)
        errors[recipe.sums] = float(qjax.sqnr_db(y, q.apply_fn(q.params, X)))
    assert 0 < abs(errors["float"] - errors["quantized"]) < 2


def test_their_ranges_are_searched_like_those_of_layers():
    """Most values are below 0, where the ReLU hides them, and one is far above the others."""
    z = jnp.concatenate([jax.random.normal(jax.random.key(0), (4000,)) - 1, jnp.float32([-60, 9])])
    errors = {}
    for method in ("absmax", "output_mse"):
        recipe = qjax.recipe(4, range_method=method, sums="quantized")
        fitted, rounded = fit_junction(RELU, recipe, z[None], z[None])
        np.testing.assert_array_equal(rounded[0], fitted.grid.project(z))
        assert int(fitted.grid.zero_point) == 0
        errors[method] = float(jnp.mean((jax.nn.relu(rounded[0]) - jax.nn.relu(z)) ** 2))
        expected = qjax.sqnr_db(jax.nn.relu(z), jax.nn.relu(rounded[0]))
        np.testing.assert_allclose(fitted.sqnr_db, expected, rtol=1e-4)
    assert errors["output_mse"] < 0.9 * errors["absmax"]


def test_the_report_names_them():
    records = quantized().report.sums
    assert [record.name for record in records] == NAMES
    assert [record.kind for record in records] == ["sum", "pool", "concat"]
    assert [record.shape for record in records] == [(8,), (2,), (6,)]
    assert all(record.bits == 8 and record.sqnr_db > 35 for record in records)
    lines = [line.split() for line in str(quantized().report).splitlines()]
    names = [words[0] for words in lines]
    assert names.index("b") + 1 == names.index("b/sum") == names.index("b/pool") - 1
    assert lines[names.index("b/sum")][1:4] == ["sum", "–/–/8", "relu"]
    assert len(quantized().report) == 5, "layers alone are counted"
    assert len(qjax.cost(quantized())) == 5


def test_they_are_saved_and_explained(tmp_path: Path):
    q = quantized()
    qjax.save(tmp_path / "model", q)
    loaded = qjax.load(tmp_path / "model", apply_fn)
    chex.assert_trees_all_equal(loaded.params, q.params, strict=True)
    assert loaded.report == q.report and str(loaded.report) == str(q.report)
    np.testing.assert_array_equal(loaded.apply_fn(loaded.params, X), q.apply_fn(q.params, X))
    steps = qjax.explain(loaded, "d", X[:1]).steps
    assert any(step.number == "uint8" for step in steps)


def test_a_value_that_lies_on_a_grid_gets_no_second_one():
    def tanh_between(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["stem"])
        return x + x @ params["a"]

    found = {}
    for position in ("pre_activation", "both"):
        recipe = dataclasses.replace(small.CHEAP, output_position=position, sums="quantized")
        q = qjax.quantize(tanh_between, make_params(), X, recipe)
        np.testing.assert_array_equal(qjax.integer(q)(q.params, X), q.apply_fn(q.params, X))
        found[position] = sorted(q.params["sums"])
    assert found == {"pre_activation": ["a/sum", "stem/branch"], "both": ["a/sum"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sums": "int8"}, "`sums` must be one of float, quantized; got 'int8'"),
        ({"outputs": None}, "`sums` quantized needs `outputs` with static ranges.*; got float"),
        (
            {"outputs": qjax.QuantSpec(8, False, "per_tensor", ranges="dynamic")},
            "`sums` quantized needs `outputs` with static ranges.*; got dynamic ranges",
        ),
    ],
)
def test_bad_recipes(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUANTIZED, **changes)


def test_they_are_not_trained():
    with pytest.raises(ValueError, match="`recipe` must leave the sums in float"):
        qjax.qat.prepare(apply_fn, make_params(), X, "lsq", QUANTIZED)
