"""The table of models that feeds all parametrization: one `Case` per model in `CASES`.

A case states which layers the quantizer must find in its model. The rules the table spells out:

* A layer is a `conv_general_dilated` or a `dot_general` with one operand, on either side, that
  depends on `params` only and one that depends on the input. Layers stand in the order of the
  flattened jaxpr.
* `kind` is `conv`, `depthwise_conv` (as many feature groups as input channels), `grouped_conv`
  (any other feature group count above 1), `dense` or `grouped_dense` (a `dot_general` with batch
  dimensions).
* `activation` is what is applied to the end of the layer's affine chain (bias, batch norm; the
  transpositions and unit-size reshapes that `einsum` and `vmap` leave are looked through): `relu`
  or `relu6` or a smooth function that has a name, however written; `other` for another nonlinear
  operation or another call of a function; `none` where the chain ends in a residual add, pooling,
  an output, the next layer, or more than one use.
* `name` is the path of the kernel in `params`, without Linen's leading `params` and NNX's trailing
  `value`. Its last component is dropped where a folder is left and no other kernel lives directly
  in it. Later uses of the same kernel are `name@1`, `name@2`.
* `kernel_shape` is that of the operand as the operation sees it.

Parameters are random, batch norm statistics included, so that folding them is never trivial.
`REFUSED` lists the models that must be refused, with the words the error message must contain.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

ApplyFn = Callable[[Any, Any], Any]


class Expected(NamedTuple):
    """One layer that the quantizer must find."""

    name: str
    kind: str
    activation: str
    kernel_shape: tuple[int, ...]


class Case(NamedTuple):
    """A model, an input of it, and the layers it has in dataflow order."""

    id: str
    apply_fn: ApplyFn
    params: chex.ArrayTree
    x: chex.ArrayTree
    expected: tuple[Expected, ...]


class Refused(NamedTuple):
    """A model that must be refused with a `ValueError` matching `match`."""

    id: str
    apply_fn: ApplyFn
    params: chex.ArrayTree
    x: chex.ArrayTree
    match: str


def normal(*shape: int) -> jax.Array:
    """An input: float32[*shape], standard normal, the same for the same shape."""
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def randomize(params: Any) -> Any:
    """Draws every floating leaf of a tree of arrays or `ShapeDtypeStruct`; others become zeros.

    Kernels are N(0, 2 / fan_in), biases and running means N(0, 0.2²), scales U(0.5, 1.5), running
    variances U(0.5, 2). Drawing in NumPy from shapes costs no compilation, unlike running `init`.
    """
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path).lower()
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if "var" in name or "<flat index" in name:  # so does Equinox call its running statistics
            values = rng.uniform(0.5, 2.0, leaf.shape)
        elif "scale" in name:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        elif math.prod(leaf.shape) == max(leaf.shape, default=1):
            values = rng.normal(0.0, 0.2, leaf.shape)
        else:
            fan_in = math.prod(leaf.shape) / leaf.shape[-1]
            values = rng.normal(0.0, math.sqrt(2 / fan_in), leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    """A float32 array yet to be drawn by `randomize`."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def relaxed(apply_fn: ApplyFn) -> ApplyFn:
    """Lets a third-party model promote dtypes and ranks while the library around it may not."""

    @functools.wraps(apply_fn)
    def wrapper(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return apply_fn(*args)

    return wrapper


def linen(id: str, model: nn.Module, x: jax.Array, *expected: Expected) -> Case:
    """The case of a Linen model: `params` is its whole `variables` dict."""
    variables = jax.eval_shape(relaxed(model.init), jax.random.key(0), x)
    return Case(id, relaxed(model.apply), randomize(variables), x, expected)


# ---- Flax Linen


class CNN(nn.Module):
    """Conv, BatchNorm and relu, with both poolings and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (4, 8):
            x = nn.Conv(features, (3, 3), use_bias=features == 4)(x)
            x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Conv(8, (3, 3))(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def linen_cnn() -> Case:
    return linen(
        "linen_cnn",
        CNN(),
        normal(4, 16, 16, 3),
        Expected("Conv_0", "conv", "relu", (3, 3, 3, 4)),
        Expected("Conv_1", "conv", "relu", (3, 3, 4, 8)),
        Expected("Conv_2", "conv", "none", (3, 3, 8, 8)),
        Expected("Dense_0", "dense", "relu", (32, 16)),
        Expected("Dense_1", "dense", "none", (16, 10)),
    )


class Block(nn.Module):
    """A residual block: the last batch norm and the shortcut's both end in the residual add."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = conv((3, 3), self.strides, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv((3, 3), name="conv2")(y))
        if x.shape != y.shape:
            x = norm(name="norm0")(conv((1, 1), self.strides, name="shortcut")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, an identity block and a strided block with a projection shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = Block(4, 1, name="block0")(x)
        x = Block(8, 2, name="block1")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def linen_resnet() -> Case:
    return linen(
        "linen_resnet",
        ResNet(),
        normal(4, 8, 8, 3),
        Expected("stem", "conv", "relu", (3, 3, 3, 4)),
        Expected("block0/conv1", "conv", "relu", (3, 3, 4, 4)),
        Expected("block0/conv2", "conv", "none", (3, 3, 4, 4)),
        Expected("block1/conv1", "conv", "relu", (3, 3, 4, 8)),
        Expected("block1/conv2", "conv", "none", (3, 3, 8, 8)),
        Expected("block1/shortcut", "conv", "none", (1, 1, 4, 8)),
        Expected("head", "dense", "none", (8, 10)),
    )


class MobileNet(nn.Module):
    """Every way a convolution can be placed: groups, dilation, strides, VALID, SAME, explicit."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu6(norm()(nn.Conv(8, (3, 3), 2, padding="SAME", name="stem")(x)))
        depthwise = nn.Conv(8, (3, 3), feature_group_count=8, padding="VALID", name="depthwise")
        x = nn.relu6(norm()(depthwise(x)))
        x = norm()(nn.Conv(8, (1, 1), name="project")(x))  # linear bottleneck
        grouped = nn.Conv(
            8, (3, 3), feature_group_count=2, padding=((0, 1), (2, 0)), name="grouped"
        )
        x = jnp.clip(grouped(x), 0.0, 6.0)
        dilated = nn.Conv(
            8, (3, 2), kernel_dilation=(1, 2), padding=((1, 1), (2, 0)), name="dilated"
        )
        x = nn.hard_swish(dilated(x))
        multiplied = nn.Conv(16, (2, 2), 2, feature_group_count=8, name="multiplied")
        x = jnp.minimum(jnp.maximum(multiplied(x), 0.0), 6.0)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def linen_mobilenet() -> Case:
    return linen(
        "linen_mobilenet",
        MobileNet(),
        normal(4, 16, 16, 3),
        Expected("stem", "conv", "relu6", (3, 3, 3, 8)),
        Expected("depthwise", "depthwise_conv", "relu6", (3, 3, 1, 8)),
        Expected("project", "conv", "none", (1, 1, 8, 8)),
        Expected("grouped", "grouped_conv", "relu6", (3, 3, 4, 8)),
        Expected("dilated", "conv", "hard_swish", (3, 2, 8, 8)),
        Expected("multiplied", "depthwise_conv", "relu6", (2, 2, 1, 16)),
        Expected("head", "dense", "none", (8 * 2, 10)),
    )


class Transformer(nn.Module):
    """Attention products have activations for both operands: they are no layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(8, name="down")(y)


def linen_transformer() -> Case:
    return linen(
        "linen_transformer",
        Transformer(),
        normal(4, 5, 8),
        Expected("attention/query", "dense", "none", (8, 2, 4)),
        Expected("attention/key", "dense", "none", (8, 2, 4)),
        Expected("attention/value", "dense", "none", (8, 2, 4)),
        Expected("attention/out", "dense", "none", (2, 4, 8)),
        Expected("up", "dense", "gelu_tanh", (8, 16)),  # no call in the jaxpr: it uses z thrice
        Expected("down", "dense", "none", (16, 8)),
    )


# ---- Flax NNX, Equinox, Haiku


class NNX(nnx.Module):
    """The CNN of NNX, batch norm in evaluation mode."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def nnx_cnn() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: NNX(nnx.Rngs(0))))
    return Case(
        "nnx_cnn",
        lambda params, x: nnx.merge(graph, params)(x),
        randomize(state),
        normal(4, 8, 8, 3),
        (
            Expected("conv", "conv", "relu", (3, 3, 3, 4)),
            Expected("head", "dense", "none", (4, 10)),
        ),
    )


class EquinoxCNN(eqx.Module):
    """One image, channels first; batch norm divides by a square root and keeps integer counters."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        self.conv = eqx.nn.Conv2d(3, 4, 3, padding=1, key=key)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch", inference=True)
        self.head = eqx.nn.Linear(4, 10, key=key)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> jax.Array:
        x, _ = self.norm(self.conv(x), state)
        return self.head(jax.nn.relu(x).mean((1, 2)))


def equinox_cnn() -> Case:
    model = eqx.filter_eval_shape(eqx.nn.make_with_state(EquinoxCNN), jax.random.key(0))
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    @relaxed
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        model, state = eqx.combine((params["model"], params["state"]), static)
        return jax.vmap(lambda image: model(image, state), axis_name="batch")(x)

    return Case(
        "equinox_cnn",
        apply_fn,
        randomize({"model": arrays[0], "state": arrays[1]}),
        normal(4, 3, 8, 8),
        (
            Expected("model/conv", "conv", "relu", (4, 3, 3, 3)),
            Expected("model/head", "dense", "none", (10, 4)),
        ),
    )


def equinox_mlp() -> Case:
    model = eqx.filter_eval_shape(eqx.nn.MLP, 6, 10, 16, depth=2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Case(
        "equinox_mlp",
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        randomize(arrays),
        normal(8, 6),
        (
            Expected("layers/0", "dense", "relu", (16, 6)),
            Expected("layers/1", "dense", "relu", (16, 16)),
            Expected("layers/2", "dense", "none", (10, 16)),
        ),
    )


class HaikuStem(hk.Module):
    """A convolution made in the constructor: Haiku files it under `stem/~/conv`."""

    def __init__(self):
        super().__init__(name="stem")
        self.conv = hk.Conv2D(4, 3, stride=2, with_bias=False, name="conv")

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        return jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="norm")(self.conv(x), is_training))


def haiku_cnn() -> Case:
    @hk.without_apply_rng
    @hk.transform_with_state
    def network(x: jax.Array, is_training: bool) -> jax.Array:
        x = jnp.tanh(hk.DepthwiseConv2D(1, 3, name="depthwise")(HaikuStem()(x, is_training)))
        return hk.Linear(10, name="head")(x.mean((1, 2)))

    x = normal(4, 8, 8, 3)
    init = functools.partial(network.init, is_training=True)  # else it creates no statistics
    params, state = jax.eval_shape(relaxed(init), jax.random.key(0), x)
    return Case(
        "haiku_cnn",
        lambda params, x: network.apply(params["params"], params["state"], x, False)[0],
        randomize({"params": params, "state": state}),
        x,
        (
            Expected("stem/~/conv", "conv", "relu", (3, 3, 3, 4)),
            Expected("depthwise", "depthwise_conv", "tanh", (3, 3, 1, 4)),
            Expected("head", "dense", "none", (4, 10)),
        ),
    )


# ---- Plain JAX


def plain_nchw() -> Case:
    """Channels first, kernels OIHW; the affine chains subtract, negate and divide along axis 1."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        conv = functools.partial(
            lax.conv_general_dilated, dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = conv(x, params["w1"], (2, 1), "SAME") * params["scale1"] - params["shift1"]
        x = conv(jnp.maximum(0.0, x), params["w2"], (1, 1), "VALID", feature_group_count=2)
        x = (params["shift2"] - x) / params["scale2"]
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    affine = {k: array(1, 8, 1, 1) for k in ("scale1", "shift1", "scale2", "shift2")}
    return Case(
        "plain_nchw",
        apply_fn,
        randomize({"w1": array(8, 3, 3, 3), "w2": array(8, 4, 3, 3)} | affine),
        normal(4, 3, 8, 8),
        (
            Expected("w1", "conv", "relu", (8, 3, 3, 3)),
            Expected("w2", "grouped_conv", "none", (8, 4, 3, 3)),
        ),
    )


def plain_mlp() -> Case:
    """The list of (weight, bias) tuples of the JAX tutorials."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jax.nn.relu(jnp.dot(x, w) + b[None])
        w, b = params[-1]
        return jax.nn.softmax(x @ w + b[None])

    sizes = (6, 16, 16, 10)
    params = [(array(i, o), array(o)) for i, o in itertools.pairwise(sizes)]
    return Case(
        "plain_mlp",
        apply_fn,
        randomize(params),
        normal(8, 6),
        (
            Expected("0", "dense", "relu", (6, 16)),
            Expected("1", "dense", "relu", (16, 16)),
            Expected("2", "dense", "none", (16, 10)),  # softmax(z) uses z twice
        ),
    )


ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "clip": (lambda z: jnp.clip(z, 0.0, 6.0), "relu6"),
    "clamp": (lambda z: lax.clamp(0.0, z, 6.0), "relu6"),
    "clip_other": (lambda z: jnp.clip(z, -1.0, 1.0), "other"),
    "gelu": (jax.nn.gelu, "gelu_tanh"),
    "identity": (lambda z: z, "none"),
    "leaky_relu": (jax.nn.leaky_relu, "leaky_relu"),
    "max": (lambda z: jnp.maximum(0.0, z), "relu"),
    "max_min": (lambda z: jnp.minimum(6.0, jnp.maximum(z, 0.0)), "relu6"),
    "max_of_two": (lambda z: jnp.maximum(z, jnp.sin(z)), "none"),  # used twice
    "relu": (jax.nn.relu, "relu"),
    "relu6": (jax.nn.relu6, "relu6"),
    "residual": (lambda z: jax.nn.relu(z) + z, "none"),  # used twice
    "sigmoid": (jax.nn.sigmoid, "sigmoid"),
    "silu": (jax.nn.silu, "silu"),
    "silu_by_hand": (lambda z: z * jax.nn.sigmoid(z), "silu"),
    "sum": (lambda z: z.sum(1), "none"),
    "tanh": (jnp.tanh, "tanh"),
    "where": (lambda z: jnp.where(z > 0, z, 0.0), "relu"),
}


def activations() -> Case:
    """Every way to spell an activation: one dense layer and one output each."""
    return Case(
        "activations",
        lambda params, x: {k: f(x @ params[k]) for k, (f, _) in ACTIVATIONS.items()},
        randomize({k: array(6, 4) for k in ACTIVATIONS}),
        normal(8, 6),
        tuple(Expected(k, "dense", a, (6, 4)) for k, (_, a) in ACTIVATIONS.items()),
    )


def shared_kernel() -> Case:
    """One kernel used three times, the last time transposed (tied weights)."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x @ params["w"] + params["b1"])
        x = jax.nn.relu(x @ params["w"] + params["b2"])
        return x @ params["w"].T

    return Case(
        "shared_kernel",
        apply_fn,
        randomize({"w": array(8, 8), "b1": array(1, 8), "b2": array(1, 8)}),
        normal(8, 8),
        (
            Expected("w", "dense", "relu", (8, 8)),
            Expected("w@1", "dense", "relu", (8, 8)),
            Expected("w@2", "dense", "none", (8, 8)),
        ),
    )


def nested() -> Case:
    """Layers inside jit and remat, all under one jit; one block runs on three sets of kernels."""

    @jax.jit
    def block(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p["w"] + p["b"])

    @jax.checkpoint
    def pair(p: Any, x: jax.Array) -> jax.Array:
        return x + block(p["inner"], x) @ p["w_out"]

    @jax.jit
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = block(params["second"], block(params["first"], x))
        return pair(params["pair"], x) @ params["pair"]["w_head"]

    dense = {"w": array(8, 8), "b": array(1, 8)}
    params = {
        "first": dense,
        "second": dense,
        "pair": {"inner": dense, "w_out": array(8, 8), "w_head": array(8, 3)},
    }
    return Case(
        "nested",
        apply_fn,
        randomize(params),
        normal(8, 8),
        (
            Expected("first", "dense", "relu", (8, 8)),
            Expected("second", "dense", "relu", (8, 8)),
            Expected("pair/inner", "dense", "relu", (8, 8)),
            Expected("pair/w_out", "dense", "none", (8, 8)),  # two kernels in the folder `pair`
            Expected("pair/w_head", "dense", "none", (8, 3)),
        ),
    )


def two_inputs() -> Case:
    """A dict of two inputs, a dict of two outputs, one of them not an output of a layer."""

    def apply_fn(params: Any, x: Any) -> dict[str, jax.Array]:
        image = lax.conv(x["image"], params["conv"]["w"], (1, 1), "SAME").mean((2, 3))
        vector = jnp.tanh(x["vector"] @ params["dense"]["w"])
        joint = jnp.concatenate([image, vector], 1)
        return {"score": joint @ params["score"]["w"], "norm": (joint**2).sum(1)}

    return Case(
        "two_inputs",
        apply_fn,
        randomize(
            {
                "conv": {"w": array(4, 3, 3, 3)},
                "dense": {"w": array(6, 4)},
                "score": {"w": array(8, 2)},
            }
        ),
        {"image": normal(4, 3, 8, 8), "vector": normal(4, 6)},
        (
            Expected("conv", "conv", "none", (4, 3, 3, 3)),
            Expected("dense", "dense", "tanh", (6, 4)),
            Expected("score", "dense", "none", (8, 2)),
        ),
    )


def grouped_dense() -> Case:
    """One matrix per group; `einsum` puts a transposition between product and bias."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(jnp.einsum("bgi,gio->bgo", x, params["w1"]) + params["b1"])
        return jnp.einsum("bgi,gio->bgo", x, params["w2"])

    return Case(
        "grouped_dense",
        apply_fn,
        randomize({"w1": array(3, 4, 8), "b1": array(1, 3, 8), "w2": array(3, 8, 5)}),
        normal(8, 3, 4),
        (
            Expected("w1", "grouped_dense", "relu", (3, 4, 8)),
            Expected("w2", "grouped_dense", "none", (3, 8, 5)),
        ),
    )


CASES: tuple[Case, ...] = (
    linen_cnn(),
    linen_resnet(),
    linen_mobilenet(),
    linen_transformer(),
    nnx_cnn(),
    equinox_cnn(),
    equinox_mlp(),
    haiku_cnn(),
    plain_nchw(),
    plain_mlp(),
    activations(),
    shared_kernel(),
    nested(),
    two_inputs(),
    grouped_dense(),
)


# ---- Models that cannot be quantized and say so


def refused_loops() -> tuple[Refused, ...]:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    def while_loop(p: Any, x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: x.sum() > 1.0, lambda x: step(p["w"][0], x), x)

    def cond(p: Any, x: jax.Array) -> jax.Array:
        return lax.cond(x.sum() > 0.0, lambda x: step(p["w"][0], x), lambda x: x, x)

    @jax.custom_vjp
    def own_gradient(w: jax.Array, x: jax.Array) -> jax.Array:
        return step(w, x)

    own_gradient.defvjp(lambda w, x: (step(w, x), (w, x)), lambda r, g: (r[0] * 0.0, g))

    def custom_vjp(p: Any, x: jax.Array) -> jax.Array:
        return own_gradient(p["w"][0], x)

    params, x = randomize({"w": array(3, 8, 8)}), normal(8, 8)
    return (
        Refused("while_loop", while_loop, params, x, "while"),
        Refused("cond", cond, params, x, "cond"),
        Refused("custom_vjp", custom_vjp, params, x, "custom_vjp"),
    )


def refused_closures() -> tuple[Refused, ...]:
    kernel = randomize(array(4, 3, 3, 3))
    params, x = randomize({"b": array(1, 4, 1, 1)}), normal(4, 3, 8, 8)

    def closure(p: Any, x: jax.Array) -> jax.Array:
        return lax.conv(x, kernel, (1, 1), "SAME") + p["b"]

    return (
        Refused("closure", closure, params, x, "closed over"),
        Refused("closure_in_jit", jax.jit(closure), params, x, "closed over"),
    )


REFUSED: tuple[Refused, ...] = refused_loops() + refused_closures()
