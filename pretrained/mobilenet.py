"""Networks of inverted residual blocks in Flax Linen: MobileNetV2 and EfficientNet-Lite.

Kernels live at paths such as `block3/depthwise/kernel`.

References:
  Sandler et al., 2018, arXiv:1801.04381, table 2.
  EfficientNet-Lite: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the first block of every stage, in both families


class Block(NamedTuple):
    """An inverted residual block.

    Attributes:
      expanded: channels of its depthwise convolution.
      size: side of that convolution's kernel.
      stride: of that convolution.
      features: channels of its output.
    """

    expanded: int
    size: int
    stride: int
    features: int


class _InvertedResidual(nn.Module):
    """1x1 to `expanded` channels unless there are as many, depthwise, 1x1; plus its input."""

    block: Block
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[N, H, W, C] to float[N, H / stride, W / stride, features]."""
        expanded, size, stride, features = self.block
        y = x
        if expanded != x.shape[-1]:
            y = self.conv(expanded, 1, 1, name="expand")(y)
            y = nn.relu6(self.norm(name="bn0")(y))
        y = self.conv(expanded, size, stride, feature_group_count=expanded, name="depthwise")(y)
        y = nn.relu6(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(self.conv(features, 1, 1, name="project")(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """A stem with stride 2, inverted residual blocks, a 1x1 head, the mean, a classifier.

    Attributes:
      stem: channels of the stem.
      blocks: the blocks.
      head: channels of the head.
      num_classes: logits per image.
      same_padding: pad as TensorFlow does, else by half the kernel on every side.
      epsilon: of batch norm.
    """

    stem: int
    blocks: tuple[Block, ...]
    head: int
    num_classes: int
    same_padding: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps preprocessed images float[N, H, W, 3] to logits float[N, num_classes]."""

        def conv(features: int, size: int, stride: int, **fields: Any) -> nn.Conv:
            padding = "SAME" if self.same_padding else size // 2
            shape = {"kernel_size": (size, size), "strides": stride, "padding": padding}
            return nn.Conv(features, use_bias=False, **shape, **fields)

        norm = partial(nn.BatchNorm, use_running_average=not train, epsilon=self.epsilon)
        x = nn.relu6(norm(name="bn0")(conv(self.stem, 3, 2, name="stem")(x)))
        for i, block in enumerate(self.blocks):
            x = _InvertedResidual(block, conv, norm, name=f"block{i}")(x)
        x = nn.relu6(norm(name="bn1")(conv(self.head, 1, 1, name="head")(x)))
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))
