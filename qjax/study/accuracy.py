"""Measuring how often a classifier is right."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.progress import Progress


def top1(
    apply_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    images: Any,
    labels: Any,
    *,
    preprocess: Callable[[Any], Any] | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> float:
    """Counts the images whose greatest logit is that of their label.

    Args:
      apply_fn: function of (params, x) that returns logits float[N, classes].
      params: its params.
      images: [N, ...], all of them.
      labels: int[N].
      preprocess: applied to every batch of images first, e.g. uint8 to normalized float32.
      batch_size: images that go through the network together.
      progress: called with ("", images done, images).

    Returns:
      The share of right answers in percent.

    Raises:
      ValueError: there is no image, or not one label per image.
    """
    total = len(images)
    if total == 0 or len(labels) != total:
        raise ValueError(
            "`images` and `labels` must be as many, and at least one; got "
            f"{total} images and {len(labels)} labels."
        )

    @jax.jit
    def classify(params: Any, x: jax.Array) -> jax.Array:
        return jnp.argmax(apply_fn(params, x), -1)

    # Batches of one size compile once; the last one is filled up with the first images.
    size = min(batch_size, total)
    right = 0
    for start in range(0, total, size):
        rows = np.arange(start, start + size) % total
        batch = images[rows] if preprocess is None else preprocess(images[rows])
        kept = min(size, total - start)
        right += np.sum(np.asarray(classify(params, batch))[:kept] == labels[rows][:kept])
        if progress is not None:
            progress("", start + kept, total)
    return 100 * float(right) / total
