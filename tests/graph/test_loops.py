"""What becomes of loops: which are unrolled, and which of their steps are one layer."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import qjax
from qjax.graph.layers import find_layers

X = jnp.ones((2, 3, 4))
W = jnp.ones((4, 4))


def test_the_start_of_a_recurrence_is_read_by_a_layer_whatever_the_batch():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda h, x: (jnp.tanh(h @ params["w"] + x), None)  # noqa: E731
        return lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))[0]

    for x in (X, X[:1]):
        network = find_layers(apply_fn, {"w": W}, x)
        assert [site.layer.name for site in network.sites] == ["w", "w", "w"]
        assert [site.layer.macs for site in network.first_sites] == [3 * 16]
        assert len({site.kernel for site in network.sites}) == 1


def test_a_kernel_that_a_step_reads_twice_is_two_layers():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda i, h: jax.nn.relu(h @ params["w"]) @ params["w"]  # noqa: E731
        return lax.fori_loop(0, 3, step, x[:, 0])

    layers = qjax.trace(apply_fn, {"w": W}, X)
    assert [(layer.name, layer.activation) for layer in layers] == [("w", "relu"), ("w@1", "none")]


def test_what_differs_between_steps_is_not_folded_into_the_kernel_they_share():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda h, b: ((h @ params["w"]) * 2.0 + b[None], None)  # noqa: E731
        return jax.nn.relu(lax.scan(step, x[:, 0], params["b"])[0])

    network = find_layers(apply_fn, {"w": W, "b": jnp.ones((3, 4))}, X)
    assert [site.layer.activation for site in network.sites] == ["none"] * 3
    for site in network.sites:
        assert [operation.primitive for operation in site.operations] == ["mul"]
        assert site.activated is site.output


def test_a_loop_over_blocks_that_share_one_kernel():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda h, w: (jax.nn.relu(h @ w @ params["shared"]), None)  # noqa: E731
        return lax.scan(step, x[:, 0], params["own"])[0]

    layers = qjax.trace(apply_fn, {"own": jnp.ones((3, 4, 4)), "shared": W}, X)
    assert [layer.name for layer in layers] == ["own[0]", "shared", "own[1]", "own[2]"]


def test_a_kernel_closed_over_in_a_loop_is_refused():
    with pytest.raises(ValueError, match="closed over"):
        qjax.trace(lambda p, x: lax.map(lambda x: x @ W + p["b"][None], x), {"b": W[0]}, X)
