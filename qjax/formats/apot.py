"""Additive powers of two (APoT): a product with such a weight is a few shifts and a sum."""

import dataclasses
import itertools
from typing import ClassVar

from qjax.formats.multiples import Multiples, multiples
from qjax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class APoT(Multiples):
    """Values 0 and ±scale times sums of different powers of two."""

    name: ClassVar[str] = "apot"


def sums_of_powers(bits: int) -> list[int]:
    """The magnitudes Σ_i p_i of b bits, in units of the least power.

    A sign takes one bit, each term p_i two: with n = ⌊(b − 1) / 2⌋ terms, p_i is 0, 2^-i,
    2^-(i+n) or 2^-(i+2n), i = 1 … n. A bit that is left over is a term of one power, which stands
    before the last n powers. 2 and 3 bits have one term, 4 and 5 have two.

    Args:
      bits: b, at least 2.

    Returns:
      2^(b−1) − 1 positive integers, ascending.

    Examples:
      >>> sums_of_powers(3), sums_of_powers(4)
      ([1, 2, 4], [1, 2, 3, 4, 6, 8, 10])

    References:
      Li et al., 2020, arXiv:1909.13144, eq. 3; the term of one power is that of the authors' code.
    """
    count, has_single = divmod(bits - 1, 2)
    every, single = range(count), [count] * has_single
    order = [*every, *every, *single, *every]  # the term of each power, the greatest first
    terms: list[list[int]] = [[0] for _ in range(count + has_single)]
    for exponent, term in zip(reversed(range(len(order))), order, strict=True):
        terms[term].append(2**exponent)
    return sorted(map(sum, itertools.product(*terms)))[1:]


ADDITIVE_POWERS = multiples(APoT, sums_of_powers)
