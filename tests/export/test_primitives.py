"""Every rule between layers, and every way in which a layer's operation is written."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from jax import lax
from models import relaxed
from onnx_runtime import quantized, run

import qjax

Function = Callable[[jax.Array], Any]

FUNCTIONS: dict[str, Function] = {
    "abs": jnp.abs,
    "acosh": lambda y: jnp.arccosh(1 + jnp.square(y)),
    "and": lambda y: (y > 0) & ~(y > 1),
    "argmax": lambda y: jnp.argmax(y, 1),
    "argmin": lambda y: jnp.argmin(y, -1),
    "atan": jnp.arctan,
    "attention": lambda y: jnp.einsum("bij,bkj->bik", y, jnp.tanh(y)),
    "average_pool": lambda y: nn.avg_pool(y, (2,), (2,)),
    "average_pool_same": lambda y: nn.avg_pool(y, (3,), (2,), "SAME", count_include_pad=False),
    "broadcast": lambda y: jnp.broadcast_to(y[:, :1], y.shape) * 2,
    "cast": lambda y: (y * 3).astype(jnp.int32),
    "clamp": lambda y: lax.clamp(-0.5, y, 0.5),
    "clamp_by_arrays": lambda y: lax.clamp(-jnp.abs(y), jnp.sin(y), jnp.square(y)),
    "class_token": lambda y: jnp.concatenate([jnp.ones((y.shape[0], 1, y.shape[2])), y], 1),
    "cumsum": lambda y: jnp.cumsum(y, 1),
    "cumsum_reversed": lambda y: lax.cumsum(y, 2, reverse=True),
    "div": lambda y: 1 / (2 + jnp.sin(y)),
    "elu": jax.nn.elu,
    "equal": lambda y: jnp.floor(y) == jnp.ceil(y - 1),
    "exp2": jnp.exp2,
    "flatten": lambda y: y.reshape(y.shape[0], -1) + 1,
    "flatten_examples": lambda y: jnp.tanh(y.reshape(-1, y.shape[2])),
    "flip": lambda y: y[:, ::-1, ::-2],
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda y: jax.nn.gelu(y, approximate=False),
    "hard_swish": jax.nn.hard_swish,
    "is_finite": lambda y: jnp.isfinite(y / jnp.maximum(y, 0)),
    "layer_norm": lambda y: jax.nn.standardize(y),
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda y: jax.nn.logsumexp(y, axis=1),
    "max_min": lambda y: jnp.maximum(jnp.minimum(y, jnp.cos(y)), -0.25),
    "max_pool": lambda y: nn.max_pool(y, (3,), (2,), "SAME"),
    "mean": lambda y: y.mean(1) + y.mean(2)[:, :1],
    "mean_keepdims": lambda y: y - y.mean(1, keepdims=True),
    "mish": jax.nn.mish,
    "not_equal": lambda y: (jnp.sign(y) != 1) ^ (y >= 0),
    "pad": lambda y: jnp.pad(y, ((0, 0), (1, 2), (0, 1)), constant_values=0.5),
    "pad_between": lambda y: lax.pad(y, 1.0, ((0, 0, 0), (1, -1, 2), (0, 0, 1))),
    "positions": lambda y: y + jnp.arange(y.shape[1], dtype=y.dtype)[None, :, None],
    "power": lambda y: jnp.abs(y) ** 1.5 + y**5 - (2 + jnp.abs(y)) ** -2,
    "prod": lambda y: y.prod(2),
    "reduce_or": lambda y: (y > 1).any(1) | (y > -1).all(1),
    "relu6": jax.nn.relu6,
    "remainder": lambda y: lax.rem(y, jnp.full_like(y, 0.3)),
    "round": jnp.round,
    "round_away": lambda y: lax.round(2 * y),
    "rsqrt": lambda y: lax.rsqrt(1 + y * y),
    "select": lambda y: jnp.where(y > 0, y, 0.1 * y),
    "select_n": lambda y: lax.select_n((y > 0).astype(jnp.int32) + (y > 1), y, -y, 2 * y),
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "split": lambda y: jnp.split(y, [1, 3], 1),
    "stack": lambda y: jnp.stack([y[:, 0], y[:, -1]], 1),
    "std": lambda y: y.std(1),
    "strided": lambda y: y[:, ::2, 1:],
    "swapped": lambda y: jnp.swapaxes(y, 1, 2) + y.sum(2)[:, None],
    "tan": lambda y: jnp.tan(y / 4),
    "tile": lambda y: jnp.tile(y, (1, 2, 1)),
    "trigonometry": lambda y: jnp.sinh(y) - jnp.cosh(y) * jnp.arctanh(jnp.sin(y) / 2),
}


@pytest.fixture(scope="module")
def computed() -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """What ONNX Runtime makes of all functions for 3 examples, and what JAX does."""

    @relaxed
    def apply_fn(params: Any, x: jax.Array) -> dict[str, Any]:
        y = x @ params["w"]
        return {name: jax.tree.leaves(function(y)) for name, function in FUNCTIONS.items()}

    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(3, 5)))}
    x = np.float32(rng.normal(size=(3, 4, 3)))
    model = qjax.to_onnx(apply_fn, params, x)
    expected = jax.jit(apply_fn)(params, x)
    outputs = run(model, x).outputs
    found = jax.tree.unflatten(jax.tree.structure(expected), outputs)
    return found, jax.tree.map(np.asarray, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_between_layers(name: str, computed: Any):
    found, expected = (values[name] for values in computed)
    for output, leaf in zip(found, expected, strict=True):
        assert output.dtype == leaf.dtype and output.shape == leaf.shape
        np.testing.assert_allclose(output, leaf, rtol=2e-5, atol=2e-6)


OPERATIONS = {case.id: case for case in operations.CASES}


@pytest.fixture(scope="module", params=["float", "quantized"])
def layers(request: pytest.FixtureRequest) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What ONNX Runtime makes of all operations, and what qjax does."""

    def apply_fn(params: Any, x: Any) -> dict[str, jax.Array]:
        def apply(case: operations.Case) -> jax.Array:
            operands = x[case.id], params[case.id]
            return case.function(*(operands[::-1] if case.kernel_is_lhs else operands))

        return {id: apply(case) for id, case in OPERATIONS.items()}

    # The examples lie on the axis of the batch in all of them but the layout that is mixed up.
    params = {id: case.kernel for id, case in OPERATIONS.items()}
    x = {id: np.asarray(case.x)[:2] for id, case in OPERATIONS.items()}
    network, expected = (apply_fn, params, x), apply_fn(params, x)
    if request.param == "quantized":
        q = quantized(*network)
        network, expected = (q, x), q.apply_fn(q.params, x)
    outputs = run(qjax.to_onnx(*network), x).outputs
    found = jax.tree.unflatten(jax.tree.structure(expected), outputs)
    return found, jax.tree.map(np.asarray, expected)


@pytest.mark.parametrize("id", OPERATIONS)
def test_an_operation_of_a_layer(id: str, layers: Any):
    found, expected = layers
    np.testing.assert_allclose(found[id], expected[id], rtol=1e-5, atol=1e-5)
