"""Levels at quantiles of the normal distribution, so that normal weights use all codes alike."""

import dataclasses
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from qjax.formats.base import Spec
from qjax.formats.codebook import Codebook, fixed_codebook
from qjax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Quantile(Codebook):
    """A codebook of quantiles of the normal distribution, see `normal_quantiles`."""

    name: ClassVar[str] = "quantile"


def normal_quantiles(bits: int) -> np.ndarray:
    """Quantiles of the normal distribution at even distances, 0 among them, from −1 to 1.

    With Q the quantile function, p = 1 − (1/(2·2^b) + 1/(2·(2^b − 1))) / 2 and n = 2^(b−1), there
    are n positive levels Q(½ + i·(p − ½)/n), i = 1 … n, and n − 1 negative ones
    −Q(½ + i·(p − ½)/(n − 1)), all divided by Q(p). At 4 bits they are NF4. Trained kernels are
    close to normal; quantiles of the kernel's own values would need a table for every scale, and
    with a table of its own `kmeans` is nearer to it.

    Args:
      bits: b, at least 2.

    Returns:
      float32[2^b], ascending.

    Examples:
      >>> print(normal_quantiles(3).round(3))
      [-1.    -0.535 -0.247  0.     0.183  0.382  0.623  1.   ]

    References:
      Dettmers et al., 2023, arXiv:2305.14314, section 3 and appendix E.
    """
    quantile, half = NormalDist().inv_cdf, 2 ** (bits - 1)
    last = 1 - (1 / 2 ** (bits + 1) + 1 / (2 * (2**bits - 1))) / 2

    def positive(count: int) -> np.ndarray:
        shares = np.linspace(0.5, last, count + 1)[1:]
        return np.array([quantile(share) for share in shares]) / quantile(last)

    levels = np.concatenate([-positive(half - 1)[::-1], [0.0], positive(half)])
    return levels.astype(np.float32)


def _levels(spec: Spec) -> np.ndarray:
    return normal_quantiles(spec.bits)


QUANTILE = fixed_codebook(Quantile, _levels)
