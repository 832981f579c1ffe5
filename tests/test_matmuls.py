"""Products of two activations on grids of their own."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import attention
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from attention import NETWORKS, Network

import qjax
from qjax.fit.scales import frame_of, moved, start
from qjax.formats.affine import QParams, quantize_array
from qjax.graph.layers import find_layers
from qjax.graph.matmuls import MatrixProduct, find_matmuls
from qjax.integer.codes import Codes
from qjax.integer.matmul import accumulate

QUANTIZED = dataclasses.replace(small.CHEAP, matmuls="quantized")
BY_NAME = {network.name: network for network in NETWORKS}
every_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)


@functools.cache
def made(network: Network) -> tuple[Any, Any]:
    return network.make()


@functools.cache
def quantized(network: Network, recipe: qjax.Recipe = QUANTIZED) -> qjax.Quantized:
    return qjax.quantize(*made(network), attention.inputs(), recipe)


# ---- Finding them


@every_network
def test_each_is_a_site_of_its_own(network: Network):
    apply_fn, params = made(network)
    traced = find_layers(apply_fn, params, attention.inputs(2))
    found = find_matmuls(traced)
    assert tuple(matmul.name for matmul in found) == network.matmuls
    assert len(traced.skipped) == len(found)
    for matmul in found:
        out = math.prod(matmul.output.aval.shape)
        assert matmul.macs == out * matmul.depth // 2


def test_the_default_leaves_them_in_float_and_lists_them():
    q = quantized(BY_NAME["masked"], small.CHEAP)
    assert set(q.params) == {"layers", "rest"} and q.report.matmuls == ()
    assert [skip.reason for skip in q.report.skipped] == ["a product of two activations"] * 2
    assert str(q.report).count("a product of two activations") == 2


def test_other_products_are_still_listed():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        kernel = params["experts"][jnp.argmax(x[0, 0]) % 2]
        return jnp.einsum("btc,bsc->bts", x, x) @ params["head"] + (x @ kernel).sum(-1)[..., None]

    shapes = {"experts": (2, attention.WIDTH, 4), "head": (attention.LENGTH, 3)}
    params = attention.make_params(**shapes)
    q = qjax.quantize(apply_fn, params, attention.inputs(), QUANTIZED)
    assert [record.name for record in q.report.matmuls] == ["input/matmul"]
    reasons = {skip.reason for skip in q.report.skipped}
    assert reasons == {
        "a part of a table, chosen by the input",
        "its kernel is chosen by the input",
    }


# ---- Their grids


@every_network
def test_the_error_is_near_that_of_matmuls_in_float(network: Network):
    apply_fn, params = made(network)
    x = attention.inputs(16, 5)
    y = apply_fn(params, x)
    errors = {
        recipe.matmuls: float(qjax.sqnr_db(y, q.apply_fn(q.params, x)))
        for recipe in (small.CHEAP, QUANTIZED)
        for q in [quantized(network, recipe)]
    }
    assert errors["quantized"] > errors["float"] - 3, "less than twice the squared error"
    assert errors["quantized"] > 27


@every_network
def test_integers_have_every_code_of_fake_quantization(network: Network):
    q, x = quantized(network), attention.inputs(16, 5)
    assert q.apply_fn.codes(q.params, x).keys() >= {*network.matmuls}
    small.assert_codes_agree(q, x)
    np.testing.assert_array_equal(qjax.integer(q)(q.params, x), q.apply_fn(q.params, x))


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": None},
        {"outputs": None, "sums": "float", "inputs": qjax.QuantSpec(4, True, "per_tensor")},
        {"sums": "quantized"},
        {"output_position": "both"},
        {"inputs": qjax.QuantSpec(12, False, "per_tensor")},
        {"overrides": {"*/matmul": {"input_bits": 5, "output_bits": 6}}},
    ],
    ids=str,
)
def test_integers_agree_in_other_recipes(changes: dict[str, Any]):
    network = BY_NAME["linen"]
    q = quantized(network, dataclasses.replace(QUANTIZED, **changes))
    x = attention.inputs(16, 5)
    small.assert_codes_agree(q, x)
    found, expected = qjax.integer(q)(q.params, x), q.apply_fn(q.params, x)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arithmetic", ["fixed_point", "divide"])
def test_arithmetics_of_integers(arithmetic: str):
    for outputs in (QUANTIZED.outputs, None):
        network = BY_NAME["jax_grouped"]
        q = quantized(network, dataclasses.replace(QUANTIZED, outputs=outputs))
        x = attention.inputs(16, 5)
        expected = q.apply_fn(q.params, x)
        found = qjax.integer(q, arithmetic=arithmetic)(q.params, x)
        assert float(qjax.sqnr_db(expected, found)) > 25


def test_operands_that_lie_on_a_grid_keep_it():
    q = quantized(BY_NAME["masked"])
    layers, matmuls = q.params["layers"], q.params["matmuls"]
    scores, mixed = (matmuls[name] for name in BY_NAME["masked"].matmuls)
    chex.assert_trees_all_equal(scores.lhs, layers["q"].outputs)
    chex.assert_trees_all_equal(scores.rhs, layers["k"].outputs)
    assert any(
        bool(operand.scale == layers["v"].outputs.scale) for operand in (mixed.lhs, mixed.rhs)
    )
    chex.assert_trees_all_equal(layers["out"].inputs, mixed.outputs)


@every_network
def test_probabilities_are_unsigned_and_do_not_exceed_one(network: Network):
    if len(network.matmuls) == 1:
        return
    grids = quantized(network).params["matmuls"][network.matmuls[1]]
    [probabilities] = [grid for grid in (grids.lhs, grids.rhs) if int(grid.zero_point) == 0]
    low, high = map(float, probabilities.range)
    assert low == 0 and 0.5 < high <= 1


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "output_mse", "kl"])
def test_every_range_method(method: str):
    network = BY_NAME["masked"]
    recipe = dataclasses.replace(QUANTIZED, range_method=method, rounding="nearest")
    q = quantized(network, recipe)
    apply_fn, params = made(network)
    x = attention.inputs(16, 5)
    assert float(qjax.sqnr_db(apply_fn(params, x), q.apply_fn(q.params, x))) > 15


def test_ranges_are_searched_for_least_error():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("btc,bsc->bts", x**3, x) @ params["head"]

    x = attention.inputs(64)
    params = attention.make_params(head=(attention.LENGTH, 3))
    errors = {}
    for method in ("absmax", "mse"):
        recipe = dataclasses.replace(qjax.recipe(4).naive(), matmuls="quantized")
        q = qjax.quantize(apply_fn, params, x, dataclasses.replace(recipe, range_method=method))
        grid = q.params["matmuls"]["input/matmul"].lhs
        errors[method] = float(jnp.mean((grid.project(x**3) - x**3) ** 2))
    assert errors["mse"] < 0.9 * errors["absmax"]


@pytest.mark.parametrize("bits", [8, 3])
def test_the_accumulator_takes_both_zero_points_off(bits: int):
    rng = np.random.default_rng(0)
    shapes, product = ((2, 3, 4, 5), (5, 2, 7, 4)), MatrixProduct(((2, 3), (3, 0)), ((0,), (1,)))
    values, centered = [], []
    for shape, zero_point in zip(shapes, (-100, 27), strict=True):
        zero_point %= 2 ** (bits - 1)
        low = -(2 ** (bits - 1))
        grid = QParams(jnp.float32(1), jnp.int32(zero_point), low, -low - 1)
        reals = jnp.float32(rng.integers(low - zero_point, -low - zero_point, shape))
        codes = quantize_array(reals, grid)
        assert codes.dtype == jnp.int8
        values.append(Codes(codes, grid.scale, grid.zero_point, 2**bits - 1, None))
        centered.append(np.asarray(codes, np.int64) - zero_point)
    acc = accumulate(product, *values)
    assert acc.dtype == jnp.int32
    np.testing.assert_array_equal(acc, np.einsum("bmkd,dbnk->bmn", *centered))


def test_programs_hold_products_of_int8():
    q, x = quantized(BY_NAME["masked"]), attention.inputs(2)
    lowered = jax.jit(qjax.integer(q)).lower(q.params, x).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    own = [line for line in products if line.count("xi8>") == 2 and "xi32>" in line]
    scores = f"tensor<2x{attention.HEADS}x{attention.LENGTH}x{attention.LENGTH}xi32>"
    assert sum(scores in line for line in own) == 1
    assert len(own) >= len(BY_NAME["masked"].matmuls)


def test_a_single_example_gets_what_it_gets_among_others():
    for name in ("fused", "jax_grouped"):
        q, x = quantized(BY_NAME[name]), attention.inputs(4, 5)
        for run in (q.apply_fn, qjax.integer(q)):
            np.testing.assert_allclose(run(q.params, x[1:2]), run(q.params, x)[1:2], atol=1e-6)
        alone = qjax.quantize(*made(BY_NAME[name]), x[:1], QUANTIZED)
        shapes = [record.shapes for record in alone.report.matmuls]
        assert shapes == [record.shapes for record in q.report.matmuls]


# ---- What is said of them


def test_the_report_names_them():
    network = BY_NAME["masked"]
    report = quantized(network).report
    assert [record.name for record in report.matmuls] == [*network.matmuls]
    scores, mixed = report.matmuls
    t, h, d = attention.LENGTH, attention.HEADS, attention.HEAD
    assert scores.kind == "matmul" and scores.widths == "8/8/8" and scores.depth == d
    assert (
        set(scores.shapes) == {(h, t, t), (t, h, d)} and scores.macs == h * t * t * d == mixed.macs
    )
    assert all(record.output_sqnr_db > 25 for record in report.matmuls)
    lines = [line.split() for line in str(report).splitlines()]
    names = [words[0] for words in lines if words]
    assert names.index("k") + 1 == names.index("k/matmul") < names.index("v/matmul")
    assert report.skipped == () and "in float" not in str(report)
    assert len(report) == 4, "layers alone are counted"


def test_the_cost_counts_their_products_and_bits():
    network = BY_NAME["masked"]
    costs = {
        recipe: qjax.cost(quantized(network, dataclasses.replace(QUANTIZED, **recipe_fields)))
        for recipe, recipe_fields in {
            "8": {},
            "4": {"overrides": {"*/matmul": {"input_bits": 4}}},
        }.items()
    }
    macs = attention.HEADS * attention.LENGTH**2 * attention.HEAD
    assert [record.name for record in costs["8"]][-2:] == [*network.matmuls]
    assert costs["8"][-1].macs == macs
    assert [costs[bits][-1].bit_operations for bits in "84"] == [64 * macs, 16 * macs]
    assert costs["4"].total.energy < costs["8"].total.energy


def test_they_are_saved(tmp_path: Path):
    for outputs in (QUANTIZED.outputs, None):
        network = BY_NAME["fused"]
        q = quantized(network, dataclasses.replace(QUANTIZED, outputs=outputs))
        qjax.save(tmp_path / "model", q)
        loaded = qjax.load(tmp_path / "model", made(network)[0])
        chex.assert_trees_all_equal(loaded.params, q.params, strict=True)
        assert loaded.report == q.report and str(loaded.report) == str(q.report)
        x = attention.inputs(4)
        np.testing.assert_array_equal(loaded.apply_fn(loaded.params, x), q.apply_fn(q.params, x))


def test_recipes_of_older_artifacts_load():
    fields = QUANTIZED.to_json()
    assert qjax.Recipe.from_json(fields) == QUANTIZED
    del fields["matmuls"]
    assert qjax.Recipe.from_json(fields) == small.CHEAP


def test_they_are_explained():
    network, x = BY_NAME["masked"], attention.inputs(1, 5)
    q = quantized(network)
    for name in network.matmuls:
        explanation = qjax.explain(q, name, x, made(network)[1])
        steps = {step.name: step for step in explanation.steps}
        assert explanation.kind == "matmul"
        products = steps["products"].values
        assert sum(products) == steps["accumulator"].values[0], "all products are shown"
        assert "100.00%" in steps["zero point and clamp"].note
        assert steps["codes of the second operand"].number == "uint8"
        assert min(s.sqnr_db for s in explanation.steps if s.sqnr_db is not None) > 20
    with pytest.raises(ValueError, match="must be one of q, k, v, out, k/matmul, v/matmul"):
        qjax.explain(q, "w", x)


def test_inputs_that_do_not_fit_are_found():
    network, x = BY_NAME["masked"], attention.inputs(4)
    q = quantized(network)
    layers = {layer.name: layer for layer in qjax.check(q, x).layers}
    assert layers["k/matmul"].input == 0 and layers["k/matmul"].clipped == 0
    found = qjax.check(q, x.at[0, 0, 0].set(jnp.nan))
    layers = {layer.name: layer for layer in found.layers}
    assert layers["k/matmul"].input > 0 and not found.is_finite


# ---- With other parts of the library


def test_overrides_name_them():
    network = BY_NAME["linen"]
    overrides = {"*/key/matmul": {"bits": 4}, "*/value/matmul": {"inputs": None}}
    q = quantized(network, dataclasses.replace(QUANTIZED, overrides=overrides))
    [record] = q.report.matmuls
    assert record.name == "attention/key/matmul" and record.bits == (4, 4, 4)
    assert [layer.widths for layer in q.report] == ["8/8/8"] * 5
    assert len(q.report.skipped) == 1
    with pytest.raises(ValueError, match="'\\*/matmul@7' matches no layer; the layers are"):
        quantized(network, dataclasses.replace(QUANTIZED, overrides={"*/matmul@7": {"bits": 4}}))


def test_the_first_and_the_last_layer_are_no_products():
    network = BY_NAME["moments"]
    recipe = qjax.recipe(4, first_last_bits=8, matmuls="quantized").naive()
    q = quantized(network, recipe)
    assert q.report.matmuls[0].bits == (4, 4, 4) and q.report[0].widths == "8/8/8"


def test_an_interrupted_run_goes_on(tmp_path: Path):
    network, x = BY_NAME["fused"], attention.inputs()
    expected = quantized(network)
    seen = []

    def interrupt(name: str, done: int, total: int) -> None:
        seen.append(name)
        if name == "out" and seen.count("out") == 1:
            raise KeyboardInterrupt

    given = (*made(network), x, QUANTIZED)
    with pytest.raises(KeyboardInterrupt):
        qjax.quantize(*given, checkpoint=tmp_path, progress=interrupt)
    q = qjax.quantize(*given, checkpoint=tmp_path, progress=interrupt)
    chex.assert_trees_all_equal(q.params, expected.params, strict=True)
    assert q.report == expected.report


def test_scales_that_move():
    q = quantized(BY_NAME["masked"])
    frame = frame_of(q.apply_fn.network(attention.inputs()), q.params)
    assert frame.owners["k/matmul", "lhs"] == ("q", "outputs")
    assert frame.owners["out", "inputs"] == ("v/matmul", "outputs")
    moving = start(frame, q.params)
    same = moved(frame, q.params, moving, is_final=True)
    chex.assert_trees_all_close(same["matmuls"], q.params["matmuls"], rtol=1e-6)
    moving.grids["k/matmul/outputs"] += math.log(2)
    before, after = (p["matmuls"]["k/matmul"] for p in (q.params, moved(frame, q.params, moving)))
    np.testing.assert_allclose(after.outputs.scale, 2 * before.outputs.scale, rtol=1e-4)
    chex.assert_trees_all_equal(after.lhs, before.lhs)


def logits(network: Network) -> Any:
    return lambda params, x: made(network)[0](params, x).mean(1)


def test_searches_by_the_end_and_tuning():
    network, x = BY_NAME["fused"], attention.inputs()
    apply_fn, params = logits(network), made(network)[1]
    recipe = dataclasses.replace(QUANTIZED, sequential=True, end_search=3)
    q = qjax.quantize(apply_fn, params, x, recipe)
    tuned = qjax.tune(q, apply_fn, params, x, steps=20, batch_size=16, rate=1e-2)
    for found in (q, tuned):
        for record in found.report.matmuls:
            grids = found.params["matmuls"][record.name]
            assert record.scales == tuple(float(grid.scale) for grid in grids)
            assert record.output_sqnr_db > 25
        small.assert_codes_agree(found, x)


def test_half_precision():
    network = BY_NAME["masked"]
    apply_fn, params = made(network)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x = attention.inputs().astype(jnp.bfloat16)
    q = qjax.quantize(apply_fn, halves, x, QUANTIZED)
    assert q.apply_fn(q.params, x).dtype == apply_fn(halves, x).dtype
    small.assert_codes_agree(q, x)


def test_in_a_loop_every_step_has_one():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            y = x @ kernel
            return x + jax.nn.softmax(y @ y.swapaxes(-1, -2)) @ y, None

        return jax.lax.scan(block, x, params["layers"])[0] @ params["head"]

    width = attention.WIDTH
    params = attention.make_params(layers=(3, width, width), head=(width, 3))
    q = qjax.quantize(apply_fn, params, attention.inputs(), QUANTIZED)
    names = [f"layers[{i}]/matmul{end}" for i in range(3) for end in ("", "@1")]
    assert [record.name for record in q.report.matmuls] == names
    small.assert_codes_agree(q, attention.inputs(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matmuls": "int8"}, "`matmuls` must be one of float, quantized; got 'int8'"),
        ({"inputs": None}, "`matmuls` quantized needs `inputs` with static ranges.*; got float"),
        (
            {"inputs": qjax.QuantSpec(8, False, "per_tensor", ranges="dynamic")},
            "`matmuls` quantized needs `inputs` with static ranges; got dynamic ranges",
        ),
    ],
)
def test_bad_recipes(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUANTIZED, **changes)


def test_what_is_refused():
    network = BY_NAME["masked"]
    apply_fn, params = made(network)
    x = attention.inputs()
    with pytest.raises(ValueError, match="`recipe` must leave the matmuls in float"):
        qjax.qat.prepare(apply_fn, params, x, "lsq", QUANTIZED)
    shape = jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32)
    with pytest.raises(ValueError, match="`matmuls` quantized needs the values of their operands"):
        qjax.quantize(apply_fn, params, shape, QUANTIZED)
    dynamic = qjax.QuantSpec(8, False, "per_tensor", ranges="dynamic")
    recipe = dataclasses.replace(QUANTIZED, overrides={"*/matmul": {"inputs": dynamic}})
    with pytest.raises(ValueError, match="must give the matmul 'k/matmul' static ranges"):
        qjax.quantize(apply_fn, params, x, recipe)


def test_sums_beyond_32_bits_are_refused():
    network = BY_NAME["masked"]
    wide = qjax.QuantSpec(16, False, "per_tensor")
    q = quantized(network, dataclasses.replace(QUANTIZED, overrides={"*/matmul": {"inputs": wide}}))
    with pytest.raises(ValueError, match="matmul 'k/matmul' can reach .* beyond 32 bits; use"):
        qjax.integer(q)(q.params, attention.inputs(2))
