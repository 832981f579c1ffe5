"""Predictions of classifiers: how often they are right, and what quantization changes in them."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.progress import Progress

Z95 = 1.959964  # standard deviations that hold 95 % of a normal distribution


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

    Examples:
      >>> import jax.numpy as jnp
      >>> top1(lambda params, x: x * params, jnp.ones(()), np.eye(3), np.array([0, 1, 1]))
      66.66666666666667
    """
    total = len(images)
    if total == 0 or len(labels) != total:
        raise ValueError(
            "`images` and `labels` must be as many, and at least one; got "
            f"{total} images and {len(labels)} labels."
        )
    right, done = 0, 0
    for rows, batch in _batches(images, preprocess, batch_size):
        logits = np.asarray(_evaluate(_with_hash(apply_fn), params, batch))[: len(rows)]
        right += np.sum(logits.argmax(-1) == labels[rows])
        done += len(rows)
        if progress is not None:
            progress("", done, total)
    return 100 * float(right) / total


def predict(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    preprocess: Callable[[Any], Any] | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Evaluates a classifier on all images.

    Args:
      apply_fn: a function of (params, x) that returns logits float[N, classes].
      params: its params.
      images: [N, ...], at least one.
      preprocess: applied to every batch of images first.
      batch_size: images that go through the network together.

    Returns:
      float32[N, classes].
    """
    parts = [
        np.asarray(_evaluate(_with_hash(apply_fn), params, batch), np.float32)[: len(rows)]
        for rows, batch in _batches(images, preprocess, batch_size)
    ]
    return np.concatenate(parts)


def _batches(
    images: Any, preprocess: Callable[[Any], Any] | None, batch_size: int
) -> Iterator[tuple[np.ndarray, Any]]:
    """Batches of one size, which compile once, each with the numbers of the images it stands for.

    The last one is filled up with the first images.
    """
    total = len(images)
    size = min(batch_size, total)
    for start in range(0, total, size):
        rows = np.arange(start, start + size) % total
        batch = images[rows] if preprocess is None else preprocess(images[rows])
        yield rows[: total - start], batch


class _Identified(NamedTuple):
    """A function without a hash, known by its identity."""

    function: Callable[[Any, Any], Any]

    def __call__(self, params: Any, x: Any) -> Any:
        return self.function(params, x)

    def __hash__(self) -> int:
        return id(self.function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identified) and other.function is self.function


def _with_hash(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    try:
        hash(function)
    except TypeError:
        return _Identified(function)
    return function


@partial(jax.jit, static_argnums=0)
def _evaluate(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> Any:
    return apply_fn(params, x)


# ---- Two networks


class Comparison(NamedTuple):
    """The predictions of a float and a quantized network; percentages of the images.

    Attributes:
      images: how many there are.
      float_top1: share of right answers of the float network.
      quantized_top1: share of right answers of the quantized one.
      float_interval: 95 % confidence interval of the former.
      quantized_interval: of the latter.
      difference: quantized less float.
      difference_interval: of that, the images being the same.
      agreement: share of the images where both predict the same class.
      confusion: images by (float prediction, quantized prediction).
      worst: images by how far their logits moved, a changed prediction first.
      float_predictions: class by image.
      quantized_predictions: class by image.
    """

    images: int
    float_top1: float
    quantized_top1: float
    float_interval: tuple[float, float]
    quantized_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    agreement: float
    confusion: np.ndarray
    worst: np.ndarray
    float_predictions: np.ndarray
    quantized_predictions: np.ndarray


def compare(float_logits: np.ndarray, quantized_logits: np.ndarray, labels: Any) -> Comparison:
    """Compares two networks' logits on the same images.

    With b images that only the quantized network gets right and c that only the float one does, the
    difference (b − c) / N has variance (b + c − (b − c)² / N) / N².

    Args:
      float_logits: float[N, classes].
      quantized_logits: float[N, classes].
      labels: int[N].

    Returns:
      A `Comparison`.

    References:
      Wilson, 1927, J. Am. Stat. Assoc. 22, 209–212; McNemar, 1947, Psychometrika 12, 153–157.
    """
    labels = np.asarray(labels)
    total, classes = float_logits.shape
    before, after = float_logits.argmax(-1), quantized_logits.argmax(-1)
    is_right, was_right = after == labels, before == labels
    gained, lost = np.sum(is_right & ~was_right), np.sum(was_right & ~is_right)
    difference = (gained - lost) / total
    deviation = math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (before, after), 1)
    moved = np.square(float_logits - quantized_logits).sum(-1)
    worst = np.lexsort((-moved, before == after))
    return Comparison(
        total,
        100 * float(was_right.mean()),
        100 * float(is_right.mean()),
        wilson_interval(int(was_right.sum()), total),
        wilson_interval(int(is_right.sum()), total),
        100 * float(difference),
        (100 * float(difference - Z95 * deviation), 100 * float(difference + Z95 * deviation)),
        100 * float(np.mean(before == after)),
        confusion,
        worst,
        before,
        after,
    )


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, in percent.

    Args:
      right: successes.
      total: trials, at least 1.

    References:
      Wilson, 1927, J. Am. Stat. Assoc. 22, 209–212.
    """
    share, z2 = right / total, Z95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)
