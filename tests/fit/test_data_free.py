"""Quantizing without an image: by the weights alone, dynamically, or by batch norm's statistics."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QuantSpec
from qjax.fit.draws import draw_output
from qjax.fit.samples import KernelSample
from qjax.fit.search import Candidates, least
from qjax.graph.batch_norm import Statistics
from qjax.graph.layers import find_layers
from qjax.objectives.errors import MSE

SHAPE = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
CHEAP = qjax.recipe(8, rounding="nearest", sweeps=0, grid_size=8, refinements=0)
RANGE = (-1.0, 1.0)


def block(params: Any, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = (y - params["mean"]) * jax.lax.rsqrt(params["var"] + 1e-5)
    return y * params["gamma"] + params["beta"]


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(block(params["stem"], x))
    x = jax.nn.relu(block(params["body"], x) + x)
    return x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"]


@functools.cache
def images() -> Any:
    return jnp.float32(np.random.default_rng(3).uniform(-1, 1, (64, 6, 6, 3)))


@functools.cache
def params() -> Any:
    """Random params; the statistics of batch norm are the images' own."""
    rng = np.random.default_rng(0)

    def of_block(x: jax.Array, channels: int) -> Any:
        kernel = rng.normal(size=(3, 3, channels, 8)) / np.sqrt(9 * channels)
        found = {"w": kernel, "beta": rng.normal(size=(1, 1, 1, 8)) / 2}
        found |= {"gamma": rng.uniform(0.5, 2, (1, 1, 1, 8))}
        found |= {"mean": np.zeros((1, 1, 1, 8)), "var": np.ones((1, 1, 1, 8))}
        found = jax.tree.map(jnp.float32, found)
        plain = {"gamma": jnp.ones((1, 1, 1, 8)), "beta": jnp.zeros((1, 1, 1, 8))}
        y = block(found | plain, x)
        return found | {
            "mean": y.mean((0, 1, 2), keepdims=True),
            "var": y.var((0, 1, 2), keepdims=True),
        }

    stem = of_block(images(), 3)
    body = of_block(jax.nn.relu(block(stem, images())), 8)
    head = {"w": rng.normal(size=(8, 4)), "b": rng.normal(size=(1, 4))}
    return {"stem": stem, "body": body, "head": jax.tree.map(jnp.float32, head)}


@functools.cache
def quantized(recipe: qjax.Recipe, has_range: bool = False) -> qjax.Quantized:
    given: dict[str, Any] = {"input_range": RANGE} if has_range else {}
    return qjax.quantize(apply_fn, params(), SHAPE, recipe, **given)


def error_db(q: qjax.Quantized) -> float:
    return float(qjax.sqnr_db(apply_fn(params(), images()), q.apply_fn(q.params, images())))


WEIGHTS_ALONE = dataclasses.replace(CHEAP, inputs=None, outputs=None)
DYNAMIC = dataclasses.replace(
    CHEAP, inputs=QuantSpec(8, False, "per_tensor", ranges="dynamic"), outputs=None
)
DYNAMIC_INPUT = {"inputs": DYNAMIC.inputs}
STATIC = dataclasses.replace(CHEAP, overrides={"head": {"outputs": None}})


def test_a_kernel_whose_input_is_unknown_has_the_least_error_of_its_own():
    layer = quantized(WEIGHTS_ALONE).params["layers"]["stem"]
    stem, spec = params()["stem"], CHEAP.weights
    kernel = (stem["w"] * stem["gamma"] / jnp.sqrt(stem["var"] + 1e-5)).reshape(1, 27, 8)
    assert spec is not None
    candidates = Candidates(CHEAP.grid_size, CHEAP.refinements)
    format = least(MSE, KernelSample(kernel, spec), spec, candidates)
    np.testing.assert_allclose(layer.weights.scale, format.scale, rtol=1e-5)
    codes = np.rint(kernel / format.scale)
    assert np.mean(np.asarray(layer.kernel) == codes) > 0.99, "but for values halfway"


def test_gptq_is_nearest_rounding_where_the_input_is_unknown_and_not_where_it_is_drawn():
    nearest, gptq = (
        quantized(dataclasses.replace(WEIGHTS_ALONE, rounding=rounding)).params["layers"]
        for rounding in ("nearest", "gptq")
    )
    np.testing.assert_array_equal(gptq["stem"].kernel, nearest["stem"].kernel)
    assert np.any(gptq["body"].kernel != nearest["body"].kernel)


@pytest.mark.parametrize("recipe", [WEIGHTS_ALONE, DYNAMIC])
def test_weights_alone_and_dynamic_ranges_need_a_shape_and_no_more(recipe: qjax.Recipe):
    q = quantized(recipe)
    assert error_db(q) > 30
    assert [record.has_dynamic_input for record in q.report] == [recipe is DYNAMIC] * 3
    assert not q.report.recipe.reconstructions and not q.report.recipe.sequential
    assert [record.output_sqnr_db for record in q.report] == [None] * 3
    integers = qjax.integer(q)(q.params, images())
    np.testing.assert_array_equal(integers, q.apply_fn(q.params, images()))


def test_static_ranges_come_from_batch_norm_and_the_range_of_the_input():
    q = quantized(STATIC, has_range=True)
    assert error_db(q) > 20
    assert [record.widths for record in q.report] == ["8/8/8", "8/8/8", "8/8/–"]
    assert not any(record.has_dynamic_input for record in q.report)
    stem = q.params["layers"]["stem"]
    np.testing.assert_allclose(stem.inputs.range, RANGE, rtol=0.05)
    real = apply_fn(params(), images())
    np.testing.assert_array_equal(
        qjax.integer(q)(q.params, images()), q.apply_fn(q.params, images())
    )
    assert real.shape == (64, 4)


def test_the_last_ranges_may_be_after_the_activation_or_at_run_time():
    after = dataclasses.replace(STATIC, output_position="post_activation")
    assert error_db(quantized(after, has_range=True)) > 20
    first_dynamic = {"stem": DYNAMIC_INPUT, "head": {"outputs": None}}
    assert error_db(quantized(dataclasses.replace(CHEAP, overrides=first_dynamic))) > 20


def test_bias_correction_uses_the_means_of_batch_norm():
    """Means of outputs are kept: what Ŵ changes in E[Wx] goes to the bias."""
    recipe = dataclasses.replace(WEIGHTS_ALONE, weights=QuantSpec(3))
    shifts = []
    for correction in (True, False):
        q = quantized(dataclasses.replace(recipe, bias_correction=correction))
        y = q.apply_fn(q.params, images()) - apply_fn(params(), images())
        shifts.append(np.abs(y.mean(0)).mean())
    assert shifts[0] < shifts[1]


def test_the_result_is_the_same_every_time_and_whatever_the_size_of_the_shape():
    again = qjax.quantize(
        apply_fn,
        params(),
        jax.ShapeDtypeStruct((7, 6, 6, 3), jnp.float32),
        STATIC,
        input_range=RANGE,
    )
    chex.assert_trees_all_equal(again.params, quantized(STATIC, has_range=True).params, strict=True)


def test_it_is_saved_and_loaded_like_any_other(tmp_path: Path):
    q = quantized(WEIGHTS_ALONE)
    qjax.save(tmp_path / "q", q)
    loaded = qjax.load(tmp_path / "q", apply_fn)
    assert loaded.report == q.report
    assert " – " in str(q.report)


def test_draws_have_the_mean_and_the_deviation_they_are_to_have():
    [stem, *_] = find_layers(apply_fn, params(), images()).sites
    statistics = Statistics(jnp.arange(8.0), jnp.arange(8.0) / 2)
    [drawn] = draw_output(stem.layer.operation, statistics, (200, 6, 6, 8), 0, 0)
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), np.arange(8), atol=0.2)
    np.testing.assert_allclose(drawn.std((0, 1, 2)), np.arange(8) / 2, rtol=0.1)
    pooled = np.asarray(drawn.mean((1, 2))).std(0)
    np.testing.assert_allclose(pooled[1:], np.arange(1, 8) / 2 / np.sqrt(2), rtol=0.2)


# ---- What cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": None}, r"`batches` is missing; .* the shape of one: jax.ShapeDtypeStruct"),
        (
            {"batches": jax.ShapeDtypeStruct((), jnp.float32)},
            "`batches` must have a leading axis of examples; got a shape without one",
        ),
        ({"recipe": CHEAP}, "nothing is known of the input of layer 'stem': .* `input_range`"),
        (
            {"recipe": CHEAP, "input_range": RANGE},
            r"nothing is known of the output of layer 'head': no batch norm follows .* "
            r"overrides=\{'head': \{'outputs': None\}\}",
        ),
        (
            {
                "recipe": dataclasses.replace(CHEAP, output_position="post_activation"),
                "input_range": RANGE,
            },
            "nothing is known of the output of layer 'head'",
        ),
        ({"input_range": (1.0, 0.0)}, r"`input_range` must be two finite numbers, .* got \(1.0"),
        (
            {"batches": np.zeros((2, 6, 6, 3), np.float32), "input_range": RANGE},
            "`input_range` is for quantizing without images",
        ),
        (
            {"mesh": jax.sharding.Mesh(jax.devices()[:1], "x")},
            "`mesh` spreads calibration images, and `batches` has none",
        ),
    ],
)
def test_what_is_not_known_is_refused(change: Any, message: str):
    arguments = {"batches": SHAPE, "recipe": WEIGHTS_ALONE} | change
    with pytest.raises(ValueError, match=message):
        qjax.quantize(apply_fn, params(), **arguments)


def test_sums_have_no_grids_without_images():
    with pytest.raises(ValueError, match="`sums` quantized needs the values of sums"):
        qjax.quantize(apply_fn, {}, SHAPE, qjax.recipe(8, sums="quantized"))
