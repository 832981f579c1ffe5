"""Params that the input picks from as codes: embeddings, kernels of experts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx_runtime
import pytest

import qjax
from qjax.graph.layers import find_layers
from qjax.graph.tables import find_tables

RNG = np.random.default_rng(0)
QUICK: dict[str, Any] = {"grid_size": 8, "reconstructions": 1}
RECIPE = qjax.recipe(8, **QUICK, tables="quantized")
TOKENS = jnp.asarray(RNG.integers(0, 12, (32, 5)))


def normal(*shape: int) -> jax.Array:
    return jnp.float32(RNG.normal(size=shape))


def embedding(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens] + params["position"][None]
    return jnp.mean(jax.nn.relu(x @ params["hidden"]), axis=1) @ params["head"]


def tied(params: Any, tokens: jax.Array) -> jax.Array:
    x = jnp.take(params["embed"], tokens, axis=0)
    return jax.nn.relu(x @ params["hidden"]) @ params["embed"].T


def experts(params: Any, x: jax.Array) -> jax.Array:
    chosen = jnp.argmax(x @ params["router"], axis=-1)
    y = jnp.einsum("nc,ncd->nd", x, params["experts"][chosen])
    return jax.nn.relu(y) @ params["head"]


def ragged(params: Any, x: jax.Array) -> jax.Array:
    half = jnp.sum(x[:, 0] > 0).astype(jnp.int32)
    sizes = jnp.stack([half, len(x) - half])
    return jax.nn.relu(jax.lax.ragged_dot(x, params["experts"], sizes)) @ params["head"]


def half(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["embed"].astype(jnp.float32)[tokens[:, 0]]
    return x @ params["head"]


class Network(NamedTuple):
    apply_fn: Callable[[Any, Any], Any]
    params: Any
    x: jax.Array
    table: str
    matrix: tuple[int, int, int]


EMBED = {"embed": normal(12, 6) * jnp.exp(normal(12, 1)), "hidden": normal(6, 6)}
NETWORKS = {
    "embedding": Network(
        embedding,
        {**EMBED, "position": normal(5, 6), "head": normal(6, 3)},
        TOKENS,
        *("embed", (12, 6, 1)),
    ),
    "tied": Network(tied, EMBED, TOKENS, "embed", (12, 6, 1)),
    "experts": Network(
        experts,
        {"router": normal(6, 4), "experts": normal(4, 6, 7), "head": normal(7, 3)},
        normal(32, 6),
        *("experts", (4, 6, 7)),
    ),
    "ragged": Network(
        ragged,
        {"experts": normal(2, 6, 7), "head": normal(7, 3)},
        normal(32, 6),
        *("experts", (2, 6, 7)),
    ),
    "bfloat16": Network(
        half,
        {"embed": normal(12, 6).astype(jnp.bfloat16), "head": normal(6, 3)},
        TOKENS,
        *("embed", (12, 6, 1)),
    ),
}


def quantized(name: str, recipe: qjax.Recipe = RECIPE, **options: Any) -> qjax.Quantized:
    network = NETWORKS[name]
    return qjax.quantize(network.apply_fn, network.params, network.x, recipe, **options)


def held(q: qjax.Quantized, name: str) -> jax.Array:
    """What the codes of a network's table stand for."""
    network = NETWORKS[name]
    floats = network.params[network.table]
    return q.params["tables"][network.table].values(floats.shape, floats.dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_table_is_codes_with_a_scale_per_row(name: str):
    q, network = quantized(name), NETWORKS[name]
    table = q.params["tables"][network.table]
    assert table.codes.dtype == jnp.int8 and table.codes.shape == network.matrix
    rows, _, channels = network.matrix
    assert table.weights.scale.shape == (rows, 1, channels)
    assert network.table not in q.params["rest"]
    floats = np.float64(network.params[network.table].reshape(network.matrix))
    scale = np.float64(table.weights.scale)
    nearest = np.clip(np.round(floats / scale), -127, 127)
    np.testing.assert_array_equal(table.codes, nearest)
    [record] = q.report.tables
    noise = np.sum((scale * nearest - floats) ** 2)
    assert record.sqnr_db == pytest.approx(10 * np.log10(np.sum(floats**2) / noise), abs=1e-3)
    assert record.sqnr_db > 35


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_with_what_the_codes_stand_for(name: str):
    q, network = quantized(name), NETWORKS[name]
    rest = {**q.params["rest"], network.table: held(q, name)}
    expected = q.apply_fn({"layers": q.params["layers"], "rest": rest}, network.x)
    found = q.apply_fn(q.params, network.x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(qjax.integer(q)(q.params, network.x), found)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("memory", ["device", "host", "recompute"])
def test_layers_are_fitted_on_rows_of_codes(memory: str):
    """With 2 bits a row is far from its float values, and the layer after it knows."""
    recipe = qjax.recipe(8, **QUICK, tables="quantized", overrides={"embed": {"weight_bits": 2}})
    q, network = quantized("embedding", recipe, memory=memory), NETWORKS["embedding"]
    replaced = {**network.params, "embed": held(q, "embedding")}
    wanted = network.apply_fn(network.params, network.x)
    own = qjax.recipe(8, **QUICK)
    blind = qjax.quantize(network.apply_fn, network.params, network.x, own, memory=memory)
    rest = {**blind.params["rest"], "embed": replaced["embed"]}
    errors = [
        float(jnp.mean((apply(p, network.x) - wanted) ** 2))
        for apply, p in ((q.apply_fn, q.params), (blind.apply_fn, {**blind.params, "rest": rest}))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_format": "kmeans"},
        {"weight_format": "nf4"},
        {"weight_format": "power_of_two"},
        {"weights": qjax.QuantSpec(4, granularity="per_group", group_size=3)},
        {"weights": qjax.QuantSpec(4, granularity="per_tensor")},
        {"range_method": "absmax"},
    ],
    ids=str,
)
def test_a_table_has_the_format_of_weights(fields: dict[str, Any], tmp_path: Path):
    recipe = qjax.recipe(4, **QUICK, tables="quantized", **fields)
    q, network = quantized("embedding", recipe), NETWORKS["embedding"]
    expected = q.apply_fn(q.params, network.x)
    assert q.report.tables[0].bits == 4 and q.report.tables[0].sqnr_db > 10
    packed = qjax.pack(q.params)
    assert packed["tables"]["embed"].codes.stream.nbytes == 12 * 6 // 2
    np.testing.assert_array_equal(q.apply_fn(qjax.unpack(packed), network.x), expected)
    qjax.save(tmp_path / "model", q)
    loaded = qjax.load(tmp_path / "model", network.apply_fn)
    assert loaded.report == q.report
    np.testing.assert_array_equal(loaded.apply_fn(loaded.params, network.x), expected)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(q.params)


def test_overrides_name_tables():
    recipe = qjax.recipe(8, **QUICK, tables="quantized", overrides={"embed": {"weights": None}})
    assert "tables" not in quantized("embedding", recipe).params
    unknown = qjax.recipe(8, **QUICK, tables="quantized", overrides={"embedd": {"bits": 4}})
    with pytest.raises(ValueError, match="'embedd' matches no layer; the layers are .*embed"):
        quantized("embedding", unknown)
    with pytest.raises(ValueError, match="'embed' matches no layer"):
        quantized("embedding", qjax.recipe(8, **QUICK, overrides={"embed": {"bits": 4}}))


def test_what_a_table_needs_is_asked_of_the_recipe():
    with pytest.raises(ValueError, match="`tables` quantized needs `weights` in codes"):
        qjax.Recipe(weights=None, tables="quantized")
    with pytest.raises(ValueError, match="`tables` must be one of float, quantized; got 'int8'"):
        qjax.Recipe(tables="int8")  # pyright: ignore


def test_the_report_lists_tables_and_what_stays_in_float():
    plain, q = quantized("embedding", qjax.recipe(8, **QUICK)), quantized("embedding")
    assert "in float: gather" in str(plain.report) and "in float" not in str(q.report)
    assert re.search(r"embed +table +12×6 +8/–/– +none +\d+\.\d +288 → 168\n", str(q.report))
    text = str(quantized("ragged").report)
    assert "experts" in text and "in float: ragged_dot_general" in text


def test_tables_are_found_where_the_input_picks():
    for network in NETWORKS.values():
        found = find_tables(find_layers(network.apply_fn, network.params, network.x))
        assert [(t.name, t.matrix_shape) for t in found] == [(network.table, network.matrix)]


def test_without_images():
    shape = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    recipe = qjax.recipe(8, inputs=None, outputs=None, tables="quantized")
    network = NETWORKS["embedding"]
    q = qjax.quantize(network.apply_fn, network.params, shape, recipe)
    expected = network.apply_fn(network.params, network.x)
    found = q.apply_fn(q.params, network.x)
    assert float(jnp.mean((found - expected) ** 2)) < 1e-3 * float(jnp.mean(expected**2))
    assert q.params["tables"]["embed"].codes.dtype == jnp.int8


@pytest.mark.parametrize("name", ["embedding", "tied", "experts"])
def test_onnx_reads_rows_of_codes(name: str):
    network = NETWORKS[name]
    q = quantized(name, qjax.recipe(8, **QUICK, target="onnxruntime", tables="quantized"))
    model = qjax.to_onnx(q, network.x)
    [found] = onnx_runtime.run(model, network.x[:7]).outputs
    np.testing.assert_array_equal(found, q.apply_fn(q.params, network.x[:7]))
    codes = next(c for c in model.graph.initializer if c.name.endswith("table"))
    assert tuple(codes.dims) == network.matrix


def test_training_refuses_tables():
    network = NETWORKS["embedding"]
    with pytest.raises(ValueError, match="`recipe` must leave the tables in float"):
        qjax.qat.prepare(network.apply_fn, network.params, network.x, recipe=RECIPE)
