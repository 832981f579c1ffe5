"""Networks with loops give exactly what the same networks give without."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models import array, normal, randomize, relaxed

import qjax

STEPS = 3


class Pair(NamedTuple):
    """A network with a loop, and the same one without.

    Attributes:
      looped: the function with the loop.
      unrolled: the function without it.
      params: of both.
      x: an input.
      names: of the layers.
    """

    looped: Callable[[Any, Any], Any]
    unrolled: Callable[[Any, Any], Any]
    params: Any
    x: jax.Array
    names: tuple[str, ...]


def layer(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["w"] + p["b"][None])


def mlp() -> Pair:
    """A scan over stacked layers that returns every layer's output, too."""

    def looped(p: Any, x: jax.Array) -> Any:
        def step(x: jax.Array, own: Any) -> Any:
            x = jax.checkpoint(layer)(own, x)
            return x, x.mean(1)

        x, means = lax.scan(step, x, p["layers"])
        return x @ p["head"]["w"], means

    def unrolled(p: Any, x: jax.Array) -> Any:
        means = []
        for i in range(STEPS):
            x = layer(jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"]), x)
            means.append(x.mean(1)[None])
        return x @ p["head"]["w"], jnp.concatenate(means)

    layers = {"w": array(STEPS, 6, 6), "b": array(STEPS, 6)}
    params = randomize({"layers": layers, "head": {"w": array(6, 4)}})
    names = ("layers[0]", "layers[1]", "layers[2]", "head")
    return Pair(looped, unrolled, params, normal(16, 6), names)


def backwards() -> Pair:
    """A loop over an index, and a reversed scan without a carry of its own within a scan."""

    def looped(p: Any, x: jax.Array) -> Any:
        x = lax.fori_loop(0, 2, lambda i, x: jax.nn.relu(x @ p["first"][i]), x)

        def outer(x: jax.Array, ws: jax.Array) -> Any:
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), x[0]), x, ws, reverse=True)

        return lax.scan(outer, x, p["second"])

    def unrolled(p: Any, x: jax.Array) -> Any:
        for i in range(2):
            x = jax.nn.relu(x @ p["first"][i])
        firsts = []
        for ws in p["second"]:
            own = []
            for i in (1, 0):
                own = [x[0][None], *own]
                x = jnp.tanh(x @ ws[i])
            firsts.append(jnp.concatenate(own)[None])
        return x, jnp.concatenate(firsts)

    params = randomize({"first": array(2, 6, 6), "second": array(2, 2, 6, 6)})
    second = (f"second[{i}][{j}]" for i in (0, 1) for j in (1, 0))
    return Pair(looped, unrolled, params, normal(16, 6), ("first[0]", "first[1]", *second))


class Block(nn.Module):
    """A residual block of a convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), None


def linen() -> Pair:
    """`nn.scan` of rematerialized residual blocks."""
    stack = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )(name="blocks")
    x = normal(8, 4, 4, 4)

    @relaxed
    def looped(variables: Any, x: jax.Array) -> jax.Array:
        return stack.apply(variables, x, None)[0]

    @relaxed
    def unrolled(variables: Any, x: jax.Array) -> jax.Array:
        for i in range(2):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
            x, _ = Block().apply(own, x, None)
        return x

    variables = jax.eval_shape(relaxed(stack.init), jax.random.key(0), x, None)
    return Pair(looped, unrolled, randomize(variables), x, ("conv[0]", "conv[1]"))


def of_nnx() -> Pair:
    """`nnx.scan` over stacked linear layers."""

    @nnx.vmap
    def make(key: jax.Array) -> nnx.Linear:
        return nnx.Linear(6, 6, rngs=nnx.Rngs(key))

    graph, state = nnx.split(make(jax.random.split(jax.random.key(0), STEPS)))

    @relaxed
    def looped(params: Any, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, model: nnx.Linear) -> jax.Array:
            return nnx.relu(model(x))

        return forward(x, nnx.merge(graph, params))

    @relaxed
    def unrolled(params: Any, x: jax.Array) -> jax.Array:
        for i in range(STEPS):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            x = nnx.relu(nnx.merge(graph, own)(x))
        return x

    names = ("kernel[0]", "kernel[1]", "kernel[2]")
    return Pair(looped, unrolled, randomize(state), normal(16, 6), names)


STACKED = {"mlp": mlp, "backwards": backwards, "linen": linen, "nnx": of_nnx}
each_stacked = pytest.mark.parametrize("pair", [make() for make in STACKED.values()], ids=STACKED)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@each_stacked
def test_a_loop_over_stacked_params_is_a_layer_for_every_element(pair: Pair, tmp_path: Any):
    looped, unrolled = (
        qjax.quantize(apply_fn, pair.params, pair.x, qjax.recipe(4, sweeps=0))
        for apply_fn in (pair.looped, pair.unrolled)
    )
    assert tuple(record.name for record in looped.report) == pair.names
    assert str(looped.report) == str(unrolled.report)
    assert jax.tree.structure(looped.params) == jax.tree.structure(unrolled.params)
    assert_same(looped.params, unrolled.params)
    assert looped.params["rest"] == {}
    assert_same(looped.apply_fn(looped.params, pair.x), unrolled.apply_fn(unrolled.params, pair.x))
    outputs = [qjax.integer(q)(q.params, pair.x) for q in (looped, unrolled)]
    assert_same(*outputs)
    qjax.save(tmp_path / "model", looped)
    loaded = qjax.load(tmp_path / "model", pair.looped, pair.params)
    assert_same(loaded.apply_fn(loaded.params, pair.x), looped.apply_fn(looped.params, pair.x))


def test_a_loop_of_too_many_steps_is_refused_with_their_number():
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((600, 4))

    def recurrent(params: Any, x: jax.Array) -> jax.Array:
        step = lambda h, x: (jnp.tanh(h @ params["w"] + (x @ params["w"])[None]), None)  # noqa: E731
        return lax.scan(step, jnp.ones((1, 4)), x)[0]

    def mapped(params: Any, x: jax.Array) -> jax.Array:
        return lax.map(lambda x: (x @ params["w"]) @ params["w"], x)

    message = r"a loop of 600 steps .* has 1,200 .* at most 1,024 are unrolled; "
    with pytest.raises(ValueError, match=message + "quantize it on a shorter sequence"):
        qjax.trace(recurrent, params, x)
    with pytest.raises(ValueError, match=message + r"use `jax.vmap` in place of `lax.map`"):
        qjax.trace(mapped, params, x)


def test_a_loop_without_layers_stays_a_loop():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda h, _: (h @ x, None), x, None, length=5000)[0] @ params["w"]

    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((4, 4))
    [layer] = qjax.trace(apply_fn, params, x)
    assert layer.name == "w"


def test_an_override_names_one_element():
    pair = mlp()
    recipe = qjax.recipe(8, overrides={"layers[1]": {"bits": 4}}).naive()
    q = qjax.quantize(pair.looped, pair.params, pair.x, recipe)
    bits = {record.name: record.weight_bits for record in q.report}
    assert bits == {"layers[0]": 8, "layers[1]": 4, "layers[2]": 8, "head": 8}
