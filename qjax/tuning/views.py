"""Views of unlabeled examples: mirrored, shifted, and blended with each other.

A blend is λ·x + (1 − λ)·x' of two examples. No label is needed for it: what it should give is what
the float network gives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.fit.blends import blended

SHIFT = 1 / 8  # of the side of an image, the farthest that it is moved
CHANNELS = 4  # at most, on an axis that is taken for the channels of an image


class View(NamedTuple):
    """How the examples of one batch are shown.

    Attributes:
      mirrored: bool[N], left and right exchanged.
      corners: int32[N, 2], shifts by pixels from 0 to twice the greatest, which stands for none.
      partners: int32[N], the examples that they are blended with.
      shares: float32[N], λ: of each example itself; 1 where it is not blended.
    """

    mirrored: np.ndarray
    corners: np.ndarray
    partners: np.ndarray
    shares: np.ndarray


def draw(rng: np.random.Generator, x: Any) -> View:
    """Draws a view for every example of a batch: half of them are mirrored, half are blended.

    Args:
      rng: of the draw.
      x: the batch, or its shapes.
    """
    leaves = jax.tree.leaves(x)
    count = len(leaves[0])
    farthest = _farthest(leaves[0].shape)
    shares = np.where(rng.random(count) < 0.5, rng.random(count), 1.0)
    return View(
        rng.random(count) < 0.5,
        rng.integers(0, 2 * farthest + 1, (count, 2)).astype(np.int32),
        rng.permutation(count).astype(np.int32),
        shares.astype(np.float32),
    )


def show(view: View, x: Any) -> Any:
    """Makes the views of a batch.

    Images float[N, H, W, C] or float[N, C, H, W] of at most four channels are mirrored and shifted,
    what moves in being the mirror image of the border. Arrays of floats are blended; with integers
    among them (tokens) an example stays what it is.
    """
    seen = jax.tree.map(lambda leaf: _moved(view, leaf), x)
    return blended(seen, view.partners, view.shares)


def _moved(view: View, images: jax.Array) -> jax.Array:
    axes = _spatial_axes(images.shape)
    if axes is None or not jnp.issubdtype(images.dtype, jnp.floating):
        return images
    is_mirrored = view.mirrored.reshape(-1, 1, 1, 1)
    images = jnp.where(is_mirrored, jnp.flip(images, axes[1]), images)
    farthest = _farthest(images.shape)
    if not farthest:
        return images
    around = [(farthest, farthest) if axis in axes else (0, 0) for axis in range(4)]
    shape = images.shape[1:]

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = [jnp.zeros((), jnp.int32)] * 3
        for position, axis in enumerate(axes):
            start[axis - 1] = corner[position]
        return lax.dynamic_slice(image, start, shape)

    return jax.vmap(cut)(jnp.pad(images, around, mode="reflect"), jnp.asarray(view.corners))


def _farthest(shape: Sequence[int]) -> int:
    axes = _spatial_axes(shape)
    return 0 if axes is None else int(SHIFT * min(shape[axis] for axis in axes))


def _spatial_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """The axes of height and width; None where an array is no image."""
    if len(shape) != 4:
        return None
    if shape[3] <= CHANNELS:
        return 1, 2
    return (2, 3) if shape[1] <= CHANNELS else None
