"""Small networks with attention, for tests of products of two activations."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LENGTH, WIDTH, HEADS, HEAD = 6, 16, 4, 4
QUERIES, KEYS = (WIDTH, HEADS, HEAD), (WIDTH, HEADS // 2, HEAD)


class Network(NamedTuple):
    """A network and the products of two activations in it.

    Attributes:
      name: of the network.
      make: returns (apply_fn, params).
      matmuls: their names, in dataflow order.
    """

    name: str
    make: Callable[[], tuple[Callable[[Any, Any], Any], Any]]
    matmuls: tuple[str, ...]


def inputs(count: int = 32, seed: int = 1) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).normal(size=(count, LENGTH, WIDTH)))


def make_params(**shapes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(0)
    return {
        name: jnp.float32(rng.normal(size=shape) / np.sqrt(WIDTH / 2))
        for name, shape in shapes.items()
    }


def masked() -> tuple[Any, Any]:
    """Causal attention as one writes it."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btc,chd->bthd", x, params[name]) for name in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5
        seen = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        return jnp.einsum("bthd,hdc->btc", mixed, params["out"])

    return apply_fn, make_params(q=QUERIES, k=QUERIES, v=QUERIES, out=(HEADS, HEAD, WIDTH))


def from_jax(keys: tuple[int, ...], is_causal: bool) -> tuple[Any, Any]:
    """`jax.nn.dot_product_attention`."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btc,chd->bthd", x, params[name]) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
        return jnp.einsum("bthd,hdc->btc", mixed, params["out"])

    return apply_fn, make_params(q=QUERIES, k=keys, v=keys, out=(HEADS, HEAD, WIDTH))


def fused() -> tuple[Any, Any]:
    """One projection to queries, keys and values, heads of their own."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        qkv = (x @ params["qkv"]).reshape(*x.shape[:2], 3, HEADS, HEAD)
        q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * HEAD**-0.5)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(*x.shape[:2], WIDTH)
        return jax.nn.relu(mixed @ params["out"]) @ params["head"]

    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "head": (WIDTH, 3)}
    return apply_fn, make_params(**shapes)


def grouped() -> tuple[Any, Any]:
    """Two queries to a key, by an einsum."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        q = jnp.einsum("btc,chd->bthd", x, params["q"]).reshape(-1, LENGTH, HEADS // 2, 2, HEAD)
        k, v = (jnp.einsum("btc,chd->bthd", x, params[name]) for name in "kv")
        weights = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k))
        mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(-1, LENGTH, WIDTH)
        return mixed @ params["out"]

    return apply_fn, make_params(q=QUERIES, k=KEYS, v=KEYS, out=(WIDTH, WIDTH))


def linen() -> tuple[Any, Any]:
    """Flax Linen's attention in a block, with a residual sum."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")
            x = x + attention(nn.LayerNorm()(x))
            return nn.Dense(3, name="head")(x.mean(1))

    model = Block()
    params = model.init(jax.random.key(0), inputs(1))
    return model.apply, jax.tree.map(lambda leaf: leaf + 0.1, params)


def from_nnx() -> tuple[Any, Any]:
    """Flax NNX's attention."""
    model = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    definition, params = nnx.split(model, nnx.Param)[:2]
    return lambda params, x: nnx.merge(definition, params)(x), params


def moments() -> tuple[Any, Any]:
    """A product of a value with itself, without a layer before it."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("btc,bsc->bts", x, x) @ params["head"]

    return apply_fn, make_params(head=(LENGTH, 3))


NETWORKS = (
    Network("masked", masked, ("k/matmul", "v/matmul")),
    Network("jax", functools.partial(from_jax, QUERIES, False), ("k/matmul", "v/matmul")),
    Network("jax_causal", functools.partial(from_jax, QUERIES, True), ("k/matmul", "v/matmul")),
    Network("jax_grouped", functools.partial(from_jax, KEYS, False), ("k/matmul", "v/matmul")),
    Network("fused", fused, ("qkv/matmul", "qkv/matmul@1")),
    Network("grouped", grouped, ("k/matmul", "v/matmul")),
    Network("linen", linen, ("attention/key/matmul", "attention/value/matmul")),
    Network("nnx", from_nnx, ("key/matmul", "value/matmul")),
    Network("moments", moments, ("input/matmul",)),
)
