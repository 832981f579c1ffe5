"""A vision transformer for small images."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class EncoderBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each after a layer norm and within a residual sum.

    Attributes:
      heads: attention heads, which share the width of the tokens.
      hidden: units of the perceptron.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens float[N, T, D] to tokens float[N, T, D]."""
        normed = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(normed)
        hidden = nn.gelu(nn.Dense(self.hidden, name="fc1")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(x.shape[-1], name="fc2")(hidden)


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer whose head reads the mean of the tokens.

    Attributes:
      patch: side of the square patches, in pixels.
      width: numbers per token.
      depth: encoder blocks.
      heads: attention heads per block.
      hidden: units of each block's perceptron.
      num_classes: logits per image.

    References:
      Dosovitskiy et al., 2021, arXiv:2010.11929; Beyer et al., 2022, arXiv:2205.01580 (the mean in
      place of a class token).
    """

    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int = 128
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps preprocessed images float[N, H, W, C] to logits float[N, num_classes]."""
        del train
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="embedding")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        position = nn.initializers.normal(0.02)
        x = x + self.param("position", position, (1, *x.shape[1:]), jnp.float32)
        for i in range(self.depth):
            x = EncoderBlock(self.heads, self.hidden, name=f"block{i}")(x)
        return nn.Dense(self.num_classes, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))
