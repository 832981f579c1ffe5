"""Random crops and mirror images, on device, for a batch of stored pixels."""

import jax
import jax.numpy as jnp
from jax import lax


def shift_and_crop(key: jax.Array, images: jax.Array, shift: int, size: int) -> jax.Array:
    """Cuts a random window out of every image, which may stick out by `shift` pixels on each side.

    Args:
      key: of the draw.
      images: [N, H, H, C]; beyond the border they go on as in a mirror.
      shift: pixels of border.
      size: side of the window, at most H.

    Returns:
      [N, size, size, C].
    """
    n, side, _, channels = images.shape
    border = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = jnp.pad(images, border, mode="reflect") if shift else images
    corners = jax.random.randint(key, (n, 2), 0, side + 2 * shift - size + 1)
    return jax.vmap(
        lambda image, corner: lax.dynamic_slice(image, (*corner, 0), (size, size, channels))
    )(padded, corners)


def mirror(images: jax.Array, chosen: jax.Array) -> jax.Array:
    """Mirrors left and right the images [N, H, W, C] that are `chosen`, bool[N]."""
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)
