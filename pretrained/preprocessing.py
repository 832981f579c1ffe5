"""From stored pixels to network input."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Preprocessing(NamedTuple):
    """The map x = (pixel / scale - mean) / std, per channel.

    Attributes:
      scale: the largest pixel value, 255 for 8-bit images.
      mean: one value per channel.
      std: one value per channel.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Maps uint8[N, H, W, C] to float32[N, H, W, C].

        Raises:
          TypeError: if the images are not uint8.
          ValueError: if they do not have rank 4 and one channel per mean.
        """
        if images.dtype != np.uint8:
            raise TypeError(
                f"`images` must be uint8 pixels, got {images.dtype}: do not normalize them first."
            )
        if images.ndim != 4 or images.shape[-1] != len(self.mean):
            raise ValueError(
                f"`images` must have shape [N, H, W, {len(self.mean)}], got {images.shape}."
            )
        mean, std = (
            jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
            for values in (self.mean, self.std)
        )
        return (jnp.asarray(images, jnp.float32) / self.scale - mean) / std


DIGITS = Preprocessing(16.0, (0.0,), (1.0,))
MNIST = Preprocessing(255.0, (0.1307,), (0.3081,))
CIFAR10 = Preprocessing(255.0, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
IMAGENET = Preprocessing(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = Preprocessing(255.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LITE = Preprocessing(1.0, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))  # EfficientNet-Lite
