"""Quantizing where JAX computes in 64 bits: float32 networks and float64 ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.objectives.divergence import divergence

RECIPES = {"naive": small.CHEAP, "default": qjax.Recipe()}


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def quantized(recipe: qjax.Recipe, dtype: Any) -> tuple[qjax.Quantized, Any]:
    x = cast(small.images(), dtype)
    return qjax.quantize(small.apply_fn, cast(small.make_params(), dtype), x, recipe), x


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_float64_network_keeps_its_type_and_has_layers_of_32_bits(recipe: qjax.Recipe):
    q, x = quantized(recipe, np.float64)
    wide = [leaf.dtype for leaf in jax.tree.leaves(q.params["layers"]) if leaf.dtype.itemsize > 4]
    assert not wide
    logits, expected = q.apply_fn(q.params, x), small.apply_fn(small.make_params(), small.images())
    assert logits.dtype == np.float64
    assert float(qjax.sqnr_db(jnp.asarray(expected, jnp.float64), logits)) > 25


def test_a_float32_network_has_the_codes_of_32_bits():
    q, x = quantized(small.CHEAP, np.float32)
    with jax.enable_x64(False):
        expected, _ = quantized(small.CHEAP, np.float32)
    jax.tree.map(np.testing.assert_array_equal, q.params, expected.params)
    assert q.apply_fn(q.params, x).dtype == np.float32


@pytest.mark.parametrize("arithmetic", ["float", "fixed_point", "shift", "divide"])
def test_integers_run_and_agree(arithmetic: str):
    q, x = quantized(small.CHEAP, np.float64)
    run = qjax.integer(q, arithmetic=arithmetic)
    assert run(q.params, x).dtype == np.float64
    if arithmetic == "float":
        codes = q.apply_fn.codes(q.params, x), run.codes(q.params, x)
        jax.tree.map(np.testing.assert_array_equal, *codes)


def test_what_comes_after_runs_too(tmp_path: Path):
    q, x = quantized(small.CHEAP, np.float64)
    qjax.save(tmp_path / "artifact", q)
    loaded = qjax.load(tmp_path / "artifact", small.apply_fn)
    np.testing.assert_array_equal(loaded.apply_fn(loaded.params, x), q.apply_fn(q.params, x))
    unpacked = jax.jit(qjax.unpack)(qjax.pack(q.params))
    np.testing.assert_array_equal(q.apply_fn(unpacked, x), q.apply_fn(q.params, x))
    assert qjax.explain(q, "conv", x[:1], cast(small.make_params(), np.float64)).steps


def test_a_divergence_is_the_one_of_32_bits():
    counts, centers = jnp.arange(64, dtype=jnp.float32), jnp.linspace(0, 1, 64, dtype=jnp.float32)
    format = qjax.QParams(jnp.float32(1 / 16), jnp.int32(0), 0, 15)
    with jax.enable_x64(False):
        expected = divergence((counts, centers), format)
    found = divergence((counts, centers), format)
    assert (found.dtype, float(found)) == (jnp.float32, float(expected))
