"""Small networks of many families in six frameworks, with random weights: `evaluate.py zoo`.

Kernels are as each framework draws them. Batch norms get statistics, scales and biases at random,
so that folding them changes something.
"""

import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

from pretrained.mobilenet import STRIDES, Block, MobileNet
from pretrained.resnet import ResNet

os.environ.setdefault("KERAS_BACKEND", "jax")

Function = Callable[[Any, Any], Any]
KEY = jax.random.key(0)
IMAGE = (32, 32, 3)
ROWS = (32, 96)  # an image as a sequence of its rows
SOUND = (1024, 1)
CLASSES = 10


class Network(NamedTuple):
    """A network of the zoo.

    Attributes:
      family: what it is.
      framework: in which it is written.
      example: the shape of what it takes, without the axis of examples.
      make: returns (apply_fn, params).
    """

    family: str
    framework: str
    example: tuple[int, ...]
    make: Callable[[], tuple[Function, Any]]


def randomized(params: Any) -> Any:
    """Draws what batch norms and biases hold; kernels stay."""
    rng = np.random.default_rng(0)
    drawn: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(
            ("scale", "var", "gamma", "moving_variance"), partial(rng.uniform, 0.5, 1.5)
        ),
        **dict.fromkeys(("bias", "mean", "beta", "moving_mean"), partial(rng.normal, 0.0, 0.1)),
    }

    def draw(path: Any, leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        name = next((name for name in reversed(names) if name in drawn), "")
        return jnp.float32(drawn[name](size=leaf.shape)) if name else leaf

    return jax.tree.map_with_path(draw, params)


def linen(family: str, model: nn.Module, example: tuple[int, ...] = IMAGE) -> Network:
    """A network in Flax Linen."""

    def make() -> tuple[Function, Any]:
        return model.apply, randomized(jax.jit(model.init)(KEY, jnp.zeros((1, *example))))

    return Network(family, "Flax Linen", example, make)


# ---- Flax Linen

norm = partial(nn.BatchNorm, use_running_average=True)
conv = partial(nn.Conv, use_bias=False)


class PreActivation(nn.Module):
    """A residual network whose blocks begin with batch norm and ReLU (arXiv:1603.05027)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, ...]."""
        x = conv(16, (3, 3))(x)
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            y = nn.relu(norm()(x))
            x = conv(features, (1, 1), stride)(y) if features != x.shape[-1] else x
            y = nn.relu(norm()(conv(features, (3, 3), stride)(y)))
            x = x + conv(features, (3, 3))(y)
        return nn.Dense(CLASSES)(nn.relu(norm()(x)).mean((1, 2)))


class VGG(nn.Module):
    """Convolutions and max pools (arXiv:1409.1556)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, ...]."""
        for features in (16, 32, 64):
            for _ in range(2):
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(64)(x)))


class DenseNet(nn.Module):
    """Every layer reads all before it (arXiv:1608.06993)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, ...]."""
        x = conv(16, (3, 3))(x)
        for block in range(3):
            for _ in range(3):
                y = conv(8, (3, 3))(nn.relu(norm()(x)))
                x = jnp.concatenate([x, y], axis=-1)
            if block < 2:
                x = conv(x.shape[-1] // 2, (1, 1))(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(nn.relu(norm()(x)).mean((1, 2)))


def resnet(shortcut: str) -> ResNet:
    """Three stages of a block each."""
    return ResNet((1, 1, 1), (16, 32, 64), False, shortcut, False, CLASSES)


def mobilenet(size: int, same_padding: bool) -> MobileNet:
    """Seven blocks, with depthwise kernels of a size in the latter half."""
    features = (8, 12, 16, 24, 32, 40, 48)
    before = (16, *features)
    blocks = [
        Block(inputs * (6 if i else 1), size if i > 2 else 3, stride, outputs)
        for i, (inputs, outputs, stride) in enumerate(zip(before, features, STRIDES, strict=False))
    ]
    return MobileNet(16, tuple(blocks), 128, CLASSES, same_padding)


# ---- Flax NNX


class MobileNetV3(nnx.Module):
    """Depthwise blocks with hard-swish and squeeze-and-excitation (arXiv:1905.02244)."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), 2, rngs=rngs)
        self.expand = nnx.List([nnx.Conv(c, 4 * c, (1, 1), rngs=rngs) for c in (16, 24)])
        self.depthwise = nnx.List(
            [
                nnx.Conv(4 * c, 4 * c, (5, 5), 2, feature_group_count=4 * c, rngs=rngs)
                for c in (16, 24)
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(4 * c, rngs=rngs) for c in (16, 24)])
        self.squeeze = nnx.List([nnx.Linear(4 * c, c, rngs=rngs) for c in (16, 24)])
        self.excite = nnx.List([nnx.Linear(c, 4 * c, rngs=rngs) for c in (16, 24)])
        self.project = nnx.List(
            [nnx.Conv(4 * c, d, (1, 1), rngs=rngs) for c, d in ((16, 24), (24, 40))]
        )
        self.head = nnx.Linear(40, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, ...]."""
        x = nnx.hard_swish(self.stem(x))
        parts = (self.expand, self.depthwise, self.norms, self.squeeze, self.excite, self.project)
        for expand, depthwise, norm, squeeze, excite, project in zip(*parts, strict=True):
            x = nnx.hard_swish(norm(depthwise(nnx.hard_swish(expand(x)))))
            gate = nnx.hard_sigmoid(excite(nnx.relu(squeeze(x.mean((1, 2))))))
            x = project(x * gate[:, None, None])
        return self.head(x.mean((1, 2)))


class ConvNeXt(nnx.Module):
    """Depthwise 7x7, layer norm, two 1x1 with GELU between them (arXiv:2201.03545)."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 32, (4, 4), 4, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([ConvNeXtBlock(32, rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, ...]."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean((1, 2))))


class ConvNeXtBlock(nnx.Module):
    """What is added to the input."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            features, features, (7, 7), feature_group_count=features, rngs=rngs
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.expand = nnx.Linear(features, 4 * features, rngs=rngs)
        self.project = nnx.Linear(4 * features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, ...]."""
        return self.project(nnx.gelu(self.expand(self.norm(self.depthwise(x)))))


def in_nnx(family: str, module: Callable[..., nnx.Module]) -> Network:
    """A network in Flax NNX."""

    def make() -> tuple[Function, Any]:
        model = module(rngs=nnx.Rngs(0))
        model.eval()
        graphdef, state = nnx.split(model)
        return lambda state, x: nnx.merge(graphdef, state)(x), randomized(state)

    return Network(family, "Flax NNX", IMAGE, make)


# ---- Equinox


def resnet_channels_first() -> tuple[Function, Any]:
    """Residual blocks on images whose channels come first, from Equinox."""
    import equinox as eqx

    keys = iter(jax.random.split(KEY, 8))
    convolution = partial(eqx.nn.Conv2d, kernel_size=3, padding=1)
    widths = (16, 32, 64)
    model = {
        "stem": convolution(3, 16, key=next(keys)),
        "narrowing": [
            convolution(before, after, stride=2, key=next(keys))
            for before, after in itertools.pairwise(widths)
        ],
        "residual": [convolution(width, width, key=next(keys)) for width in widths],
        "head": eqx.nn.Linear(64, CLASSES, key=next(keys)),
    }

    def forward(model: Any, image: jax.Array) -> jax.Array:
        x = jax.nn.relu(model["stem"](image.transpose(2, 0, 1)))
        x = jax.nn.relu(x + model["residual"][0](x))
        for narrowing, residual in zip(model["narrowing"], model["residual"][1:], strict=True):
            x = jax.nn.relu(narrowing(x))
            x = jax.nn.relu(x + residual(x))
        return model["head"](x.mean((1, 2)))

    params, static = eqx.partition(model, eqx.is_array)
    return lambda params, x: jax.vmap(partial(forward, eqx.combine(params, static)))(x), params


def mlp_mixer() -> tuple[Function, Any]:
    """Dense layers over patches and over channels in turns (arXiv:2105.01601), from Equinox."""
    import equinox as eqx

    keys = iter(jax.random.split(KEY, 8))
    patches, features = 64, 32
    model = {
        "embed": eqx.nn.Linear(48, features, key=next(keys)),
        "tokens": [eqx.nn.MLP(patches, patches, 64, 1, jax.nn.gelu, key=next(keys)) for _ in "ab"],
        "channels": [
            eqx.nn.MLP(features, features, 64, 1, jax.nn.gelu, key=next(keys)) for _ in "ab"
        ],
        "norms": [eqx.nn.LayerNorm(features) for _ in range(4)],
        "head": eqx.nn.Linear(features, CLASSES, key=next(keys)),
    }

    def forward(model: Any, image: jax.Array) -> jax.Array:
        x = image.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(patches, 48)
        x = jax.vmap(model["embed"])(x)
        for i in range(2):
            tokens, channels = model["tokens"][i], model["channels"][i]
            x = x + jax.vmap(tokens)(jax.vmap(model["norms"][2 * i])(x).T).T
            x = x + jax.vmap(channels)(jax.vmap(model["norms"][2 * i + 1])(x))
        return model["head"](x.mean(0))

    params, static = eqx.partition(model, eqx.is_array)
    return lambda params, x: jax.vmap(partial(forward, eqx.combine(params, static)))(x), params


def vision_transformer() -> tuple[Function, Any]:
    """Patches, attention and dense layers (arXiv:2010.11929), from Equinox."""
    import equinox as eqx

    keys = iter(jax.random.split(KEY, 8))
    features = 32
    model = {
        "embed": eqx.nn.Linear(48, features, key=next(keys)),
        "positions": 0.1 * jax.random.normal(next(keys), (64, features)),
        "attention": [eqx.nn.MultiheadAttention(4, features, key=next(keys)) for _ in "ab"],
        "mlps": [eqx.nn.MLP(features, features, 64, 1, jax.nn.gelu, key=next(keys)) for _ in "ab"],
        "norms": [eqx.nn.LayerNorm(features) for _ in range(4)],
        "head": eqx.nn.Linear(features, CLASSES, key=next(keys)),
    }

    def forward(model: Any, image: jax.Array) -> jax.Array:
        x = image.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 48)
        x = jax.vmap(model["embed"])(x) + model["positions"]
        for i in range(2):
            y = jax.vmap(model["norms"][2 * i])(x)
            x = x + model["attention"][i](y, y, y)
            x = x + jax.vmap(model["mlps"][i])(jax.vmap(model["norms"][2 * i + 1])(x))
        return model["head"](x.mean(0))

    params, static = eqx.partition(model, eqx.is_array)
    return lambda params, x: jax.vmap(partial(forward, eqx.combine(params, static)))(x), params


# ---- Haiku


def u_net() -> tuple[Function, Any]:
    """Down and up again, with what was there on the way down (arXiv:1505.04597), in Haiku."""
    import haiku as hk

    def forward(x: jax.Array) -> jax.Array:
        kept = []
        for features in (8, 16):
            x = jax.nn.relu(hk.Conv2D(features, 3)(x))
            kept.append(x)
            x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(hk.Conv2D(32, 3)(x))
        for features in (16, 8):
            x = hk.Conv2DTranspose(features, 2, 2)(x)
            x = jnp.concatenate([x, kept.pop()], axis=-1)
            x = jax.nn.relu(hk.Conv2D(features, 3)(x))
        return hk.Conv2D(4, 1)(x)

    network = hk.without_apply_rng(hk.transform(forward))
    return network.apply, network.init(KEY, jnp.zeros((1, *IMAGE)))


def squeeze_net() -> tuple[Function, Any]:
    """1x1 convolutions that squeeze, 1x1 and 3x3 that expand (arXiv:1602.07360), in Haiku."""
    import haiku as hk

    def forward(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(32, 3, 2)(x))
        for squeezed in (8, 12):
            y = jax.nn.relu(hk.Conv2D(squeezed, 1)(x))
            sides = [jax.nn.relu(hk.Conv2D(4 * squeezed, size)(y)) for size in (1, 3)]
            x = jnp.concatenate(sides, axis=-1)
        return hk.Conv2D(CLASSES, 1)(x).mean((1, 2))

    network = hk.without_apply_rng(hk.transform(forward))
    return network.apply, network.init(KEY, jnp.zeros((1, *IMAGE)))


# ---- Keras


def keras_rnn(cell: str) -> tuple[Function, Any]:
    """A recurrent layer over the rows of an image, in Keras."""
    import keras

    keras.utils.set_random_seed(0)
    recurrent = getattr(keras.layers, cell)(32, name="recurrent")
    head = keras.layers.Dense(CLASSES, name="head")
    return in_keras(keras.Sequential([keras.Input(ROWS), recurrent, head]))


def keras_xception() -> tuple[Function, Any]:
    """Separable convolutions (arXiv:1610.02357), in Keras."""
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.Input(IMAGE), keras.layers.Conv2D(16, 3, 2, padding="same")]
    for features in (32, 64):
        layers += [
            keras.layers.ReLU(),
            keras.layers.SeparableConv2D(features, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.MaxPooling2D(2),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(CLASSES)]
    return in_keras(keras.Sequential(layers))


def in_keras(model: Any) -> tuple[Function, Any]:
    """A Keras model as a function of its variables by path."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        trained = [params[v.path] for v in model.trainable_variables]
        others = [params[v.path] for v in model.non_trainable_variables]
        return model.stateless_call(trained, others, x)[0]

    return apply_fn, {v.path: v.value for v in model.variables}


# ---- Plain JAX


def wave_net() -> tuple[Function, Any]:
    """Dilated convolutions of a sound with gates (arXiv:1609.03499), in plain JAX."""
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> np.ndarray:
        return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)

    params = {
        "stem": kernel(3, 1, 16),
        "blocks": [
            {"filter": kernel(3, 16, 16), "gate": kernel(3, 16, 16), "out": kernel(1, 16, 16)}
            for _ in range(4)
        ],
        "head": kernel(16, CLASSES),
    }

    def convolution(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            "SAME",
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = convolution(x, params["stem"])
        for i, block in enumerate(params["blocks"]):
            y = jnp.tanh(convolution(x, block["filter"], 2**i))
            y = y * jax.nn.sigmoid(convolution(x, block["gate"], 2**i))
            x = x + convolution(y, block["out"])
        return jax.nn.relu(x).mean(1) @ params["head"]

    return apply_fn, params


def transformer() -> tuple[Function, Any]:
    """A causal transformer over rows, einsums all over, in plain JAX."""
    rng = np.random.default_rng(0)
    heads, width, features = 4, 8, 32

    def kernel(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)

    block = lambda: {  # noqa: E731
        "qkv": kernel(features, 3, heads, width),
        "out": kernel(heads, width, features),
        "up": kernel(features, 64),
        "down": kernel(64, features),
    }
    params = {
        "embed": kernel(ROWS[1], features),
        "blocks": [block(), block()],
        "head": kernel(features, CLASSES),
    }

    def normalized(x: jax.Array) -> jax.Array:
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["embed"]
        mask = jnp.tril(jnp.ones((ROWS[0], ROWS[0]), bool))
        for block in params["blocks"]:
            q, k, v = jnp.moveaxis(jnp.einsum("ntf,fshw->ntshw", normalized(x), block["qkv"]), 2, 0)
            scores = jnp.einsum("nqhw,nkhw->nhqk", q, k) / width**0.5
            shares = jax.nn.softmax(jnp.where(mask, scores, -1e9))
            x = x + jnp.einsum("nhqk,nkhw,hwf->nqf", shares, v, block["out"])
            x = x + jax.nn.silu(normalized(x) @ block["up"]) @ block["down"]
        return normalized(x)[:, -1] @ params["head"]

    return apply_fn, params


NETWORKS: dict[str, Network] = {
    "resnet": linen("ResNet", resnet("projection")),
    "resnet-a": linen("ResNet, option A", resnet("pad")),
    "preresnet": linen("pre-activation ResNet", PreActivation()),
    "vgg": linen("VGG", VGG()),
    "densenet": linen("DenseNet", DenseNet()),
    "mobilenetv2": linen("MobileNetV2", mobilenet(3, False)),
    "efficientnet-lite": linen("EfficientNet-Lite", mobilenet(5, True)),
    "mobilenetv3": in_nnx("MobileNetV3", MobileNetV3),
    "convnext": in_nnx("ConvNeXt", ConvNeXt),
    "resnet-channels-first": Network(
        "ResNet, channels first", "Equinox", IMAGE, resnet_channels_first
    ),
    "mixer": Network("MLP-Mixer", "Equinox", IMAGE, mlp_mixer),
    "vit": Network("ViT", "Equinox", IMAGE, vision_transformer),
    "unet": Network("U-Net", "Haiku", IMAGE, u_net),
    "squeezenet": Network("SqueezeNet", "Haiku", IMAGE, squeeze_net),
    "lstm": Network("LSTM", "Keras", ROWS, partial(keras_rnn, "LSTM")),
    "gru": Network("GRU", "Keras", ROWS, partial(keras_rnn, "GRU")),
    "xception": Network("Xception", "Keras", IMAGE, keras_xception),
    "wavenet": Network("1-D audio (WaveNet)", "plain JAX", SOUND, wave_net),
    "transformer": Network("causal transformer", "plain JAX", ROWS, transformer),
}
