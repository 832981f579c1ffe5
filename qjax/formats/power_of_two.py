"""Signed powers of two: a product with such a weight is a shift."""

import dataclasses
from typing import ClassVar

from qjax.formats.multiples import Multiples, multiples
from qjax.pytree import pytree

MOST = 15  # powers, the greatest code being 2^14 in int16


@pytree
@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Multiples):
    """Values 0 and ±scale·2^k."""

    name: ClassVar[str] = "power_of_two"


def powers_of_two(bits: int) -> list[int]:
    """The magnitudes 2^0 … 2^(n−1), n = 2^(b−1) − 1.

    Beyond 5 bits there would be powers of less than 2^-14 of the largest: they are left out, and
    their positions repeat the largest.

    Args:
      bits: b, at least 2.

    Examples:
      >>> powers_of_two(4)
      [1, 2, 4, 8, 16, 32, 64]

    References:
      Zhou et al., 2017, arXiv:1702.03044 (INQ), eq. 1.
    """
    return [2 ** min(k, MOST - 1) for k in range(2 ** (bits - 1) - 1)]


POWERS = multiples(PowerOfTwo, powers_of_two)
