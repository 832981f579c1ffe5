"""The axis of the examples is found where there is one."""

from typing import Any

import jax
import jax.numpy as jnp
import models
import pytest

from qjax.graph.examples import ExampleAxes, example_axes
from qjax.graph.layers import find_layers


def axes_of(apply_fn: Any, params: Any, *shape: int) -> dict[str, ExampleAxes]:
    def at(examples: int) -> Any:
        x = jax.ShapeDtypeStruct((examples, *shape), jnp.float32)
        return find_layers(apply_fn, params, x)

    return example_axes(at(3), at(4))


@pytest.mark.parametrize("id", ["linen_resnet", "plain_nchw", "equinox_cnn", "haiku_cnn"])
def test_of_a_network_in_batches_it_is_the_first(id: str):
    case = {case.id: case for case in models.CASES}[id]
    found = axes_of(case.apply_fn, case.params, *case.x.shape[1:])
    assert set(found) == {layer.name for layer in case.expected}
    assert {axes.input for axes in found.values()} == {0}


def test_it_may_be_any_axis():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        y = params["left"] @ x.T  # [channels, examples]
        return jax.nn.relu(y).T @ params["right"]

    params = {"left": jnp.ones((5, 7)), "right": jnp.ones((5, 2))}
    found = axes_of(apply_fn, params, 7)
    assert found == {"left": ExampleAxes(1, 1, 1), "right": ExampleAxes(0, 0, 0)}


def test_examples_that_are_joined_to_positions_have_none():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1]) @ params["tokens"]
        return tokens.reshape(x.shape[0], -1) @ params["head"]

    params = {"tokens": jnp.ones((4, 3)), "head": jnp.ones((15, 2))}
    assert set(axes_of(apply_fn, params, 5, 4)) == {"head"}
