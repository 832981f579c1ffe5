"""Random shifts and mirror images, on device, for a batch of stored pixels."""

import jax
import jax.numpy as jnp
from jax import lax


def shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Moves every image by up to `pixels` pixels up or down, left or right.

    Args:
      key: of the draw.
      images: [N, H, W, C]; what moves in is the mirror image of the border.
      pixels: the largest shift.

    Returns:
      [N, H, W, C].
    """
    if pixels == 0:
        return images
    n, *shape = images.shape
    around = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), around, around, (0, 0)), mode="reflect")
    corners = jax.random.randint(key, (n, 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, 0), shape))(
        padded, corners
    )


def mirror(images: jax.Array, chosen: jax.Array) -> jax.Array:
    """Mirrors left and right the images [N, H, W, C] that are `chosen`, bool[N]."""
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)
