"""Tuning scales and biases: what moves, what stays, and what comes out."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.fit.scales import frame_of, moved, start
from qjax.formats.affine import with_exact_products
from qjax.tuning.tune import Settings, run_tuning

IMAGES = small.images(96)
PARAMS = small.make_params()
FEW = qjax.recipe(3).naive()
WHERE: dict[str, Any] = {"steps": 40, "rate": 0.01, "batch_size": 16}


def quantized(recipe: qjax.Recipe = FEW) -> qjax.Quantized:
    return qjax.quantize(small.apply_fn, PARAMS, IMAGES, recipe)


def tune(q: qjax.Quantized, images: Any = IMAGES, **changes: Any) -> qjax.Quantized:
    return qjax.tune(q, small.apply_fn, PARAMS, images, **(WHERE | changes))


def residual(params: Any, x: jax.Array) -> jax.Array:
    """Three layers, one after the other, and a sum around the last one."""
    x = jax.nn.relu(x @ params["a"])
    x = jax.nn.relu(x @ params["b"])
    return (x + x @ params["c"]) @ params["head"]


def residual_params() -> Any:
    keys = dict(zip("abc", jax.random.split(jax.random.key(0), 3), strict=True))
    params = {name: jax.random.normal(key, (8, 8)) / 3 for name, key in keys.items()}
    return params | {"head": jax.random.normal(jax.random.key(4), (8, 4)) / 3}


RESIDUAL = np.asarray(jax.random.normal(jax.random.key(9), (64, 8)))


def assert_integers_agree(q: qjax.Quantized, x: Any) -> None:
    small.assert_codes_agree(q, x)
    np.testing.assert_array_equal(qjax.integer(q)(q.params, x), q.apply_fn(q.params, x))


FORMATS = {
    "inputs and outputs": FEW,
    "inputs": dataclasses.replace(FEW, outputs=None),
    "weights": dataclasses.replace(FEW, inputs=None, outputs=None),
    "per channel": qjax.recipe(3, activation_granularity="per_channel").naive(),
    "per group": dataclasses.replace(FEW, weights=qjax.QuantSpec(3, granularity="per_group")),
    "dynamic": dataclasses.replace(FEW, inputs=qjax.recipe(3, activation_ranges="dynamic").inputs),
}


@pytest.mark.parametrize("recipe", FORMATS.values(), ids=FORMATS.keys())
def test_tuning_starts_at_the_quantized_network(recipe: qjax.Recipe):
    q = quantized(recipe)
    frame = frame_of(q.apply_fn.network(IMAGES), q.params)
    same = moved(frame, q.params, start(frame, q.params), is_final=True)
    chex.assert_trees_all_equal(same, q.params, strict=True)


def test_the_tuned_network_is_nearer_to_the_float_one_and_is_one_everywhere(tmp_path: Path):
    q = quantized()
    found = run_tuning(q, small.apply_fn, PARAMS, IMAGES, Settings(**WHERE))
    assert found.is_kept
    assert found.after.plain < 0.9 * found.before.plain
    assert found.after.blended < 0.9 * found.before.blended
    after = found.q
    for name, layer in after.params["layers"].items():
        before = q.params["layers"][name]
        np.testing.assert_array_equal(layer.kernel, before.kernel)
        assert bool(jnp.any(layer.weights.scale != before.weights.scale))
        for field in ("inputs", "outputs"):
            np.testing.assert_array_equal(
                getattr(layer, field).zero_point, getattr(before, field).zero_point
            )
        assert layer.bias.dtype == jnp.int32
        np.testing.assert_array_equal(layer.outputs.scale, with_exact_products(layer.outputs).scale)
    assert_integers_agree(after, IMAGES)
    qjax.save(tmp_path / "model", after)
    again = qjax.load(tmp_path / "model", small.apply_fn)
    chex.assert_trees_all_equal(again.params, after.params, strict=True)
    assert list(again.report) == list(after.report)
    assert after.report[1].input_scale == pytest.approx(
        float(after.params["layers"]["head"].inputs.scale)
    )
    assert after.report[1].output_sqnr_db != q.report[1].output_sqnr_db
    assert "kernel codes" in str(qjax.explain(after, "conv", IMAGES[:1], PARAMS))


def test_shared_grids_stay_shared_and_sums_are_tuned_too():
    params = residual_params()
    recipe = qjax.recipe(4, sums="quantized").naive()
    q = qjax.quantize(residual, params, RESIDUAL, recipe)
    after = qjax.tune(q, residual, params, RESIDUAL, **WHERE)
    assert after is not q
    layers = after.params["layers"]
    assert float(layers["b"].inputs.scale) == float(layers["a"].outputs.scale)
    assert float(layers["a"].outputs.scale) != float(q.params["layers"]["a"].outputs.scale)
    for name, grid in after.params["sums"].items():
        assert float(grid.scale) != float(q.params["sums"][name].scale)
        np.testing.assert_array_equal(grid.scale, with_exact_products(grid).scale)
    assert after.report.sums[0].scale != q.report.sums[0].scale
    assert_integers_agree(after, RESIDUAL)


def test_what_does_not_help_is_not_kept(caplog: pytest.LogCaptureFixture):
    q = quantized()
    with caplog.at_level(logging.WARNING):
        assert tune(q, rate=3.0, steps=2) is q
    assert "tuning is not kept: on images held out the divergence went from" in caplog.text


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path: Path):
    q = quantized()
    whole = tune(q)

    def stop(item: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(q, progress=stop, checkpoint=tmp_path)
    seen: list[int] = []
    found = tune(q, progress=lambda item, done, total: seen.append(done), checkpoint=tmp_path)
    assert 0 < seen[0] <= 7 and seen[-1] == WHERE["steps"]
    chex.assert_trees_all_equal(found.params, whole.params, strict=True)
    with pytest.raises(ValueError, match="`checkpoint` .* is of another run: different settings"):
        tune(q, steps=41, checkpoint=tmp_path)


def test_devices_share_a_batch(mesh: jax.sharding.Mesh):
    q = quantized()
    alone, together = (tune(q, steps=5, rate=1e-3, mesh=each) for each in (None, mesh))
    assert together is not q
    for a, b in zip(*map(jax.tree.leaves, (alone.params, together.params)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=2)


def test_networks_of_one_recipe_share_the_program_of_a_step():
    q, other = quantized(), qjax.quantize(small.apply_fn, PARAMS, IMAGES[::-1], FEW)
    tune(q, steps=1)
    programs = len(q.apply_fn.network(IMAGES[:16]).programs)
    tune(other, steps=1)
    assert len(q.apply_fn.network(IMAGES[:16]).programs) == programs


def of_vectors(params: Any, x: jax.Array) -> jax.Array:
    return small.apply_fn(params, x)[:, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1; got 0"),
        ({"batch_size": 1.5}, "`batch_size` must be an integer of at least 1; got 1.5"),
        ({"rate": -1.0}, "`rate` must be a positive number; got -1.0"),
        ({"temperature": 0}, "`temperature` must be a positive number; got 0"),
        ({"images": IMAGES[:1]}, "`images` must hold at least 2 images, one to hold out; got 1"),
        ({"images": []}, "`images` is empty; pass at least one image"),
        ({"images": IMAGES * np.nan}, "`images` must be finite; found NaN or infinity"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tune(quantized(), **changes)


def test_networks_that_cannot_be_tuned_are_refused():
    with pytest.raises(TypeError, match="`q` must be what qjax.quantize or qjax.load returns"):
        qjax.tune(PARAMS, small.apply_fn, PARAMS, IMAGES)  # pyright: ignore
    fixed = quantized(qjax.recipe(8, fixed_point=True).naive())
    with pytest.raises(ValueError, match="with scales power_of_two, which tuning would leave"):
        tune(fixed)
    q = qjax.quantize(of_vectors, PARAMS, IMAGES, FEW)
    with pytest.raises(ValueError, match=r"must return one array of logits .*; got \(1,\)"):
        qjax.tune(q, of_vectors, PARAMS, IMAGES)
    with pytest.raises(ValueError, match="`params` must be those of the network"):
        qjax.tune(q, of_vectors, PARAMS["conv"], IMAGES)
