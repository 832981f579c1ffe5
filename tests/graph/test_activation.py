"""Activations are recognised by what they compute, however they are written."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import nn
from jax.scipy.special import erf

import qjax
from qjax.graph import elementwise
from qjax.graph.activation import ACTIVATIONS, NONE, LeakyRelu
from qjax.graph.junctions import find_junctions
from qjax.graph.layers import Network, find_layers

Function = Callable[[jax.Array], jax.Array]


def tanh_by_hand(x: jax.Array) -> jax.Array:
    return 2 * nn.sigmoid(2 * x) - 1


# By name, spellings that libraries and users have. What is affine in front of a product goes to the
# layer, so that hard-sigmoid and tanh by hand end up as the function that is left.
SPELLINGS: dict[str, tuple[Function, ...]] = {
    "none": (lambda x: x,),
    "relu": (
        nn.relu,
        lambda x: jnp.where(x > 0, x, 0),
        lambda x: jnp.where(x <= 0, jnp.zeros_like(x), x),
        lambda x: jax.lax.select(0 < x, x, jnp.zeros_like(x)),
        lambda x: x * (x > 0).astype(x.dtype),
    ),
    "relu6": (nn.relu6, lambda x: jnp.minimum(jnp.where(x > 0, x, 0), 6)),
    "elu": (nn.elu, nn.celu, lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1)),
    "gelu": (
        lambda x: nn.gelu(x, approximate=False),
        lambda x: x * (1 + erf(x / np.sqrt(2.0).astype(x.dtype))) / 2,
    ),
    "gelu_tanh": (
        nn.gelu,
        lambda x: x * 0.5 * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    ),
    "hard_sigmoid": (nn.hard_sigmoid,),
    "hard_swish": (
        nn.hard_swish,
        lambda x: x * nn.relu6(x + 3) / 6,
        lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    ),
    "leaky_relu": (
        nn.leaky_relu,
        LeakyRelu(0.2),
        lambda x: jnp.where(x > 0, x, 0.3 * x),
        lambda x: jnp.maximum(x, 0.1 * x),
    ),
    "mish": (nn.mish, lambda x: x * jnp.tanh(nn.softplus(x))),
    "quick_gelu": (lambda x: x * nn.sigmoid(1.702 * x),),
    "selu": (nn.selu,),
    "sigmoid": (nn.sigmoid, lambda x: 1 / (1 + jnp.exp(-x)), tanh_by_hand),
    "silu": (nn.silu, lambda x: x * nn.sigmoid(x), lambda x: x / (1 + jnp.exp(-x))),
    "softplus": (nn.softplus, lambda x: jnp.log1p(jnp.exp(x)), lambda x: jnp.logaddexp(x, 0.0)),
    "tanh": (jnp.tanh,),
}
# What looks similar and is none of these: of no known form, not elementwise, or read elsewhere.
OTHERS: dict[str, tuple[Function, str]] = {
    "sin": (jnp.sin, "other"),
    "clip": (lambda x: jnp.clip(x, -1, 1), "other"),
    "silu of another slope": (lambda x: x * nn.sigmoid(1.5 * x), "none"),
    "relu that is scaled": (lambda x: jnp.where(x > 0, 1.001 * x, 0), "none"),
    "softmax": (nn.softmax, "none"),
    "norm": (lambda x: x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), "none"),
    "gate": (lambda x: nn.glu(x), "none"),
    "residual": (lambda x: x + nn.silu(x), "none"),
    "by its transpose": (lambda x: x * nn.sigmoid(x.reshape(4, 8)).reshape(8, 4), "none"),
}


def network(function: Function, dtype: Any = jnp.float32) -> Network:
    params = {"w": jax.ShapeDtypeStruct((6, 4), dtype), "b": jax.ShapeDtypeStruct((1, 4), dtype)}
    x = jax.ShapeDtypeStruct((8, 6), dtype)
    return find_layers(lambda p, x: function(x @ p["w"] + p["b"]), params, x)


def test_every_activation_has_a_spelling():
    assert set(SPELLINGS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_recognised(name: str, dtype: Any):
    for spelling in SPELLINGS[name]:
        [site] = network(spelling, dtype).sites
        assert site.activation.name == site.layer.activation == name
        assert site.activation.is_pointwise and bool(site.activating) == (name != "none")


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_similar_is_not(name: str):
    function, expected = OTHERS[name]
    [site] = network(function).sites
    assert site.layer.activation == expected
    assert not site.activation.is_pointwise or site.activation == NONE


@pytest.mark.parametrize("slope", [0.2, 0.3, 0.01])
def test_a_leaky_relu_keeps_its_slope(slope: float):
    [site] = network(lambda x: nn.leaky_relu(x, slope)).sites
    x = jnp.linspace(-3.0, 3.0, 13)
    chex.assert_trees_all_close(site.activation.function(x), nn.leaky_relu(x, slope), rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_in_64_bits_are_those_of_the_function(name: str):
    x = np.random.default_rng(0).normal(size=(50, 4)) * 4
    function = ACTIVATIONS[name].function
    found = jax.jit(lambda: jnp.asarray(elementwise.evaluate(function, x), jnp.float32))()
    chex.assert_trees_all_close(found, function(jnp.float32(x)), rtol=1e-5, atol=1e-5)


def test_the_activation_of_a_sum_is_recognised():
    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        z = x @ p["b"] + x @ p["a"]
        return z * nn.sigmoid(z)

    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((6, 4))}
    found = find_layers(apply_fn, params, jnp.ones((8, 6)))
    assert [site.shortcut.activation.name for site in found.sites if site.shortcut] == ["silu"] * 2
    assert [(j.kind, j.activation.name) for j in find_junctions(found)] == [("sum", "silu")]


def test_what_only_moves_elements_is_looked_through():
    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        z = jnp.einsum("ni,gio->ngo", x, p["w"]).swapaxes(0, 1)
        return (z * nn.sigmoid(z)).sum(0)

    [layer] = qjax.trace(apply_fn, {"w": jnp.ones((3, 6, 4))}, jnp.ones((8, 6)))
    assert layer.activation == "silu"


def by_where(params: Any, x: jax.Array) -> jax.Array:
    z = x @ params["first"]
    return jnp.where(z > 0, z, 0.0) @ params["second"]


def by_relu(params: Any, x: jax.Array) -> jax.Array:
    return nn.relu(x @ params["first"]) @ params["second"]


def test_a_relu_by_where_is_folded_into_the_clamp_as_any_other():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(6, 8)), "second": rng.normal(size=(8, 3))}
    params, x = jax.tree.map(jnp.float32, (params, rng.normal(size=(32, 6))))
    one, other = (qjax.quantize(f, params, x, small.CHEAP) for f in (by_where, by_relu))
    chex.assert_trees_all_equal(one.params, other.params)
    assert str(one.report) == str(other.report)
    first, second = (one.params["layers"][name] for name in ("first", "second"))
    chex.assert_trees_all_equal(first.outputs, second.inputs)  # the codes travel on
    for run in (lambda q: q.apply_fn, qjax.integer):
        chex.assert_trees_all_equal(run(one)(one.params, x), run(other)(other.params, x))
    assert qjax.cost(one).total == qjax.cost(other).total
