"""Networks of bfloat16 and float16: integers and fake quantization agree in every code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import lax

import qjax

CHEAP = {field: getattr(small.CHEAP, field) for field in small._FIELDS}
RECIPES = {
    "8": qjax.recipe(8, **CHEAP),
    "12": qjax.recipe(8, input_bits=12, output_bits=12, **CHEAP),
    "other grids": qjax.recipe(8, input_bits=7, sums="quantized", **CHEAP),
    "after activations": qjax.recipe(8, output_position="both", **CHEAP),
}


def network(params: Any, x: jax.Array) -> jax.Array:
    """A residual sum, an activation in float, a mean in float32, a concatenation."""

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

    y = jax.nn.relu(conv(x, params["first"]) + params["bias"])
    y = jax.nn.silu(y + conv(y, params["second"]))
    y = y.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
    y = jnp.concatenate([y, jax.nn.relu6(y @ params["third"])], axis=-1)
    return (y @ params["head"]).astype(jnp.float32)


def given(dtype: Any) -> tuple[Any, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 8), "third": (8, 8), "head": (16, 4)}
    params = {k: rng.normal(size=s) / np.sqrt(np.prod(s[:-1])) for k, s in shapes.items()}
    params["bias"] = rng.normal(size=(1, 1, 1, 8)) / 4
    x = rng.normal(size=(16, 6, 6, 3))
    return {k: jnp.asarray(v, dtype) for k, v in params.items()}, jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_codes_and_logits_agree(dtype: Any, recipe: qjax.Recipe):
    params, x = given(dtype)
    q = qjax.quantize(network, params, x, recipe)
    run = qjax.integer(q)
    codes = run.codes(q.params, x)
    assert codes.keys() == set(q.params["layers"])
    jax.tree.map(np.testing.assert_array_equal, codes, q.apply_fn.codes(q.params, x))
    np.testing.assert_array_equal(run(q.params, x), q.apply_fn(q.params, x))
    noise = qjax.sqnr_db(network(params, x), q.apply_fn(q.params, x))
    assert float(noise) > 20
