"""Residual networks in Flax Linen: the CIFAR family of depth 6n+2 and the ImageNet family.

Kernels live at paths such as `layer1/block0/conv1/kernel`. All padding is explicit and symmetric,
as in PyTorch, so that converted weights give the same logits.

References:
  He et al., 2015, arXiv:1512.03385, sections 3.3 and 4.2.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5
IMAGENET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class _Block(nn.Module):
    """One residual block: relu(x' + branch(x)) where x' is the shortcut of x.

    Attributes:
      filters: channels of the block's 3x3 convolutions.
      stride: spatial stride of the block.
      bottleneck: 1x1, 3x3, 1x1 (four times `filters` channels out) instead of two 3x3.
      shortcut: `pad` (see `pad_shortcut`) or `projection` (1x1 convolution and batch norm).
    """

    filters: int
    stride: int
    bottleneck: bool
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, H / stride, W / stride, C']."""
        norm = partial(_batch_norm, train)
        if self.bottleneck:
            features, specs = 4 * self.filters, ((1, 1), (3, self.stride), (1, 1))
        else:
            features, specs = self.filters, ((3, self.stride), (3, 1))
        y = x
        for i, (size, stride) in enumerate(specs, start=1):
            last = i == len(specs)
            y = _conv(features if last else self.filters, size, stride, name=f"conv{i}")(y)
            y = norm(name=f"bn{i}")(y)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            if self.shortcut == "pad":
                x = pad_shortcut(x, self.stride, features, axis=3)
            else:
                x = _conv(features, 1, self.stride, name="shortcut_conv")(x)
                x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class _Stage(nn.Module):
    """A run of blocks `block0`, `block1`, ... at one resolution; the first one strides."""

    blocks: int
    filters: int
    stride: int
    bottleneck: bool
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, H / stride, W / stride, C']."""
        for i in range(self.blocks):
            x = _Block(
                filters=self.filters,
                stride=self.stride if i == 0 else 1,
                bottleneck=self.bottleneck,
                shortcut=self.shortcut,
                name=f"block{i}",
            )(x, train)
        return x


class ResNet(nn.Module):
    """A residual network: `stem`, stages `layer1`, `layer2`, ..., average pooling, linear `head`.

    Attributes:
      stage_sizes: blocks in each stage.
      stage_filters: base channels of each stage.
      bottleneck: use bottleneck blocks.
      shortcut: `pad` (see `pad_shortcut`) or `projection` (1x1 convolution and batch norm).
      large_stem: 7x7 stride 2 and max-pooling (ImageNet) instead of 3x3 stride 1.
      num_classes: logits per image.
    """

    stage_sizes: tuple[int, ...]
    stage_filters: tuple[int, ...]
    bottleneck: bool = False
    shortcut: str = "projection"
    large_stem: bool = False
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps preprocessed images float[N, H, W, C] to logits float[N, num_classes]."""
        if self.shortcut not in ("pad", "projection"):
            raise ValueError(f"`shortcut` must be 'pad' or 'projection', got {self.shortcut!r}.")
        filters = self.stage_filters[0]
        x = _conv(filters, 7 if self.large_stem else 3, 2 if self.large_stem else 1, name="stem")(x)
        x = _batch_norm(train, name="stem_bn")(x)
        x = nn.relu(x)
        if self.large_stem:
            padding: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), (2, 2), padding)
        for i, (blocks, filters) in enumerate(
            zip(self.stage_sizes, self.stage_filters, strict=True)
        ):
            x = _Stage(
                blocks=blocks,
                filters=filters,
                stride=1 if i == 0 else 2,
                bottleneck=self.bottleneck,
                shortcut=self.shortcut,
                name=f"layer{i + 1}",
            )(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def resnet_cifar(depth: int, num_classes: int = 10, shortcut: str = "pad") -> ResNet:
    """Returns the CIFAR-style ResNet of depth 6n+2 with 16, 32 and 64 channels.

    Args:
      depth: 20, 32, 44, 56, 110, ...
      num_classes: logits per image.
      shortcut: `pad` (option A, without parameters) or `projection` (option B).

    Returns:
      The module.

    Raises:
      ValueError: if `depth` is not 6n+2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"`depth` must be 6n+2 (8, 14, 20, 32, ...), got {depth}.")
    return ResNet((depth // 6,) * 3, (16, 32, 64), shortcut=shortcut, num_classes=num_classes)


def resnet_imagenet(depth: int, num_classes: int = 1000, large_stem: bool = True) -> ResNet:
    """Returns ResNet-18, 34 or 50 with 64 to 512 base channels and projection shortcuts.

    Args:
      depth: 18, 34 (basic blocks) or 50 (bottleneck blocks).
      num_classes: logits per image.
      large_stem: the 7x7 stem with max-pooling; False gives a 3x3 stem for images of about 32x32.

    Returns:
      The module.

    Raises:
      ValueError: if `depth` is none of these.
    """
    if depth not in IMAGENET_STAGES:
        raise ValueError(f"`depth` must be one of {sorted(IMAGENET_STAGES)}, got {depth}.")
    return ResNet(
        IMAGENET_STAGES[depth],
        (64, 128, 256, 512),
        bottleneck=depth >= 50,
        large_stem=large_stem,
        num_classes=num_classes,
    )


def pad_shortcut(x: jax.Array, stride: int, features: int, axis: int) -> jax.Array:
    """The parameter-free shortcut (option A): every `stride`-th pixel, zero channels on both sides.

    Args:
      x: float[N, H, W, C] or float[C, H, W, N].
      stride: of rows and columns.
      features: channels to reach.
      axis: of the channels.

    Returns:
      `x` with `features` channels and H / stride, W / stride pixels.
    """
    extra = features - x.shape[axis]
    widths = [(0, 0)] * 4
    widths[axis] = (extra // 2, extra - extra // 2)
    return jnp.pad(x[:, ::stride, ::stride], widths)


def _conv(features: int, size: int, stride: int, **kwargs) -> nn.Conv:
    """A bias-free convolution with PyTorch's symmetric padding size // 2."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        **kwargs,
    )


def _batch_norm(train: bool, **kwargs) -> nn.BatchNorm:
    """Batch norm by the statistics of the batch in training, by running ones otherwise."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=BATCH_NORM_EPSILON,
        **kwargs,
    )
