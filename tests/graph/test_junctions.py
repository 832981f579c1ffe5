"""Where the branches of a network meet."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import pytest

from qjax.graph.junctions import Junction, find_junctions
from qjax.graph.layers import find_layers

W = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones((8, 3))}
X = jnp.ones((4, 8))
IMAGES = jnp.ones((4, 6, 6, 8))


def junctions(apply_fn: Any, params: Any, x: Any) -> tuple[Junction, ...]:
    return find_junctions(find_layers(apply_fn, params, x))


def twice_added(params: Any, x: jax.Array) -> jax.Array:
    return (x @ params["a"] + x @ params["b"]) + x


def narrowed(params: Any, x: jax.Array) -> jax.Array:
    """A shortcut without params: every other value, and zeros."""
    y = jax.nn.relu(x @ params["a"])
    shortcut = jnp.pad(y[:, ::2, ::2, :4], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return jax.nn.relu(shortcut + y[:, ::2, ::2] @ params["b"])


def cubed(params: Any, x: jax.Array) -> jax.Array:
    x = x @ params["a"]
    return (x + 0.5 * x**3) @ params["c"]


def centered(params: Any, x: jax.Array) -> jax.Array:
    x = x @ params["a"]
    return (x - x.mean(-1, keepdims=True)) @ params["b"]


def pooled(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["a"]).mean((1, 2)) @ params["c"]


def joined(params: Any, x: jax.Array) -> jax.Array:
    return jnp.concatenate([x.mean((1, 2)), (x @ params["b"]).max((1, 2))], -1)


@pytest.mark.parametrize(
    ("apply_fn", "x", "expected"),
    [
        (twice_added, X, ["input/branch", "b/sum", "b/sum@1"]),
        (narrowed, IMAGES, ["b/sum"]),
        (cubed, X, []),
        (centered, X, []),
        (pooled, IMAGES, ["a/branch"]),
        (joined, IMAGES, ["input/branch", "input/pool", "b/concat"]),
    ],
)
def test_what_is_a_junction(apply_fn: Callable[[Any, Any], Any], x: Any, expected: list[str]):
    found = junctions(apply_fn, W, x)
    assert [junction.name for junction in found] == expected
    assert all(junction.name.startswith(junction.layer or "input") for junction in found)


def test_what_follows_is_known():
    by_id = {case.id: case for case in models.CASES}
    residual, attention = (by_id[f"linen_{name}"] for name in ("resnet", "transformer"))
    found = junctions(residual.apply_fn, residual.params, residual.x)
    assert [(j.name, j.kind, j.activation.name) for j in found] == [
        ("block0/conv2/sum", "sum", "relu"),
        ("block1/shortcut/sum", "sum", "relu"),
    ]
    found = junctions(attention.apply_fn, attention.params, attention.x)
    assert [j.name for j in found] == ["input/branch", "attention/out/sum", "down/sum"]
