"""How far a quantized network is from the float one on images that it was not tuned on."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.fit.blends import blended_in_pairs
from qjax.objectives.divergence import divergence_of_classes
from qjax.programs import FAST_TO_RUN, compiled
from qjax.quantize import Quantized

EVALUATED = 128  # images at a time


class Divergences(NamedTuple):
    """KL(softmax(f) ‖ softmax(f̂)) of the quantized network from the float one, in nats.

    Attributes:
      plain: on images: their mean, or float32[N] by image.
      blended: on blends of two of them, 0.7·x + 0.3·x'.
    """

    plain: Any
    blended: Any

    @property
    def means(self) -> "Divergences":
        """Those over the images."""
        return Divergences(*(float(each.mean()) for each in self))


def rises(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a mean rises by more than the standard error of the difference, or is not finite.

    Args:
      before: float[N], by image.
      after: float[N], of the same images.

    Examples:
      >>> rises(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.1]))
      True
      >>> rises(np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 1.5]))
      False
    """
    difference = after - before
    return not difference.mean() <= difference.std() / math.sqrt(len(difference))


class HeldOut:
    """Images, blends of them, and what the float network makes of both."""

    def __init__(self, apply_fn: Callable[[Any, Any], Any], params: Any, images: Any) -> None:
        """Evaluates the float network.

        Args:
          apply_fn: the float network.
          params: its params.
          images: an input of any number of examples.
        """
        self._count = len(jax.tree.leaves(images)[0])
        self._sets = images, blended_in_pairs(images)
        teacher = compiled(apply_fn, FAST_TO_RUN)
        self._wanted = [self._outputs(teacher, params, each) for each in self._sets]

    def divergences(self, q: Quantized) -> Divergences:
        """Those of a quantized network, by image."""
        found = (self._outputs(q.apply_fn, q.params, each) for each in self._sets)
        pairs = zip(self._wanted, found, strict=True)
        return Divergences(*(np.asarray(divergence_of_classes(*pair)) for pair in pairs))

    def _outputs(self, function: Callable[[Any, Any], Any], params: Any, images: Any) -> Any:
        starts = range(0, self._count, EVALUATED)
        parts = (
            jax.tree.map(lambda leaf, at=at: leaf[at : at + EVALUATED], images) for at in starts
        )
        return np.concatenate([np.asarray(function(params, part)) for part in parts])
