"""Whether calibration images suit a network: enough of them, and like those of its training.

Batch norm knows the mean β and the deviation γ' that every channel of a layer's output had in
training, see `qjax.graph.batch_norm`. With m and s² those on the calibration images, channels that
were normal would differ by

    KL(N(m, s²) ‖ N(β, γ'²)) = ½·(ρ + (m − β)² / γ'² − 1 − ln ρ),  ρ = s² / γ'².

The mean over the channels of a layer is a few hundredths for other images of the same kind, and
falls with their number.
"""

import logging
import statistics
from collections.abc import Mapping

import numpy as np

from qjax.fit.held_out import FEW_IMAGES
from qjax.fit.layer import Fit
from qjax.graph.batch_norm import Statistics

PAGE = "docs/calibration-data.md"
HARM = 1.1  # error on images held out, of that without a fit
UNLIKE = 0.05  # divergence in nats, the median over the layers; of n images 1 / n more
NAMED = 5  # layers in a warning
_LEAST_DEVIATION = 1e-3  # of a channel that counts, of the greatest one's

_logger = logging.getLogger(__name__)


def warn_of_few_images(fitted: Mapping[str, Fit]) -> None:
    """Names the layers whose least-squares fits would follow the draw of the images."""
    found = {name: float(fit.overfit) for name, fit in fitted.items() if fit.overfit is not None}
    worse = {name: overfit for name, overfit in found.items() if overfit > HARM}
    if worse:
        _logger.warning(
            "the calibration images are few: in %d of %d layers (%s) a fit to some of them is "
            "worse on the others than none, and is shrunk. Pass at least %d images: %s.",
            *(len(worse), len(fitted), _greatest(worse), FEW_IMAGES, PAGE),
        )


def warn_of_unlike_images(
    known: Mapping[str, Statistics], fitted: Mapping[str, Fit], count: int
) -> None:
    """Names the layers whose outputs are least like those in training, where most are unlike.

    Args:
      known: what batch norm knows of the outputs, by layer.
      fitted: the layers.
      count: calibration images.
    """
    found = {
        name: divergence(of, *np.asarray(fitted[name].output_moments, np.float64))
        for name, of in known.items()
    }
    if found and statistics.median(found.values()) > UNLIKE + 1 / count:
        _logger.warning(
            "the calibration images are unlike those that the network was trained on: outputs of "
            "layers differ from what batch norm says by %.2g nats (median of %d layers), most in "
            "%s. Calibrate on images as they will come, preprocessed as in training: %s.",
            *(statistics.median(found.values()), len(found), _greatest(found), PAGE),
        )


def divergence(known: Statistics, mean: np.ndarray, deviation: np.ndarray) -> float:
    """KL(N(m, s²) ‖ N(β, γ'²)) in nats, the mean over the channels that vary.

    Args:
      known: β and γ', float32[channels].
      mean: m, of that shape.
      deviation: s, of that shape.
    """
    beta, gamma = (np.asarray(vector, np.float64) for vector in known)
    counts = gamma > _LEAST_DEVIATION * gamma.max()
    if not counts.any():
        return 0.0
    distance, deviation = (mean - beta)[counts] / gamma[counts], deviation[counts] / gamma[counts]
    ratio = np.maximum(np.square(deviation), np.finfo(np.float32).eps)
    return float(np.mean(ratio + np.square(distance) - 1 - np.log(ratio))) / 2


def _greatest(found: Mapping[str, float]) -> str:
    """The names of the greatest."""
    names = sorted(found, key=found.__getitem__, reverse=True)
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + others
