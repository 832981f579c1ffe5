"""How wide accumulators must be: in the worst case, on real images, and to keep the accuracy."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qjax.integer import lowerings
from qjax.integer.accumulator import Accumulator, Check, Overflow, signed_width
from qjax.integer.function import integer
from qjax.progress import Progress
from qjax.quantize import Quantized
from qjax.study.cost import cost
from qjax.table import table

WIDTHS = tuple(range(10, 33))


class AccumulatorRange(NamedTuple):
    """How far the accumulator of one layer goes, bias included.

    Attributes:
      name: of the layer.
      worst_bits: the width that no input can overflow, whatever the order of the sum.
      bits: the width that the images needed at the end of the sum.
      low: the least value on the images.
      high: the greatest.
      mean: of all values.
      deviation: their standard deviation.
    """

    name: str
    worst_bits: int
    bits: int
    low: int
    high: int
    mean: float
    deviation: float


def accumulator_ranges(
    q: Quantized, batches: Sequence[Any], progress: Progress = lambda item, done, total: None
) -> tuple[AccumulatorRange, ...]:
    """Measures the accumulators of all layers that have an integer one.

    Args:
      q: the quantized network.
      batches: network inputs, at least one.
      progress: called with ("", batches done, batches).

    Returns:
      A record per layer, in dataflow order.

    Raises:
      ValueError: no layer has an integer accumulator.
    """
    run = integer(q)
    lows: dict[str, int] = {}
    highs: dict[str, int] = {}
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    squares: dict[str, float] = {}
    for done, batch in enumerate(batches):
        progress("", done, len(batches))
        for name, acc in run.accumulators(q.params, batch).items():
            values = np.asarray(acc, np.float64)
            low, high = int(values.min()), int(values.max())
            lows[name] = min(lows.get(name, low), low)
            highs[name] = max(highs.get(name, high), high)
            counts[name] = counts.get(name, 0) + values.size
            sums[name] = sums.get(name, 0.0) + values.sum()
            squares[name] = squares.get(name, 0.0) + np.square(values).sum()
    if not counts:
        raise ValueError("no layer has an integer accumulator: quantize weights and inputs.")
    found = []
    for name in (record.name for record in q.report if record.name in counts):
        mean = sums[name] / counts[name]
        variance = max(squares[name] / counts[name] - mean**2, 0.0)
        most = lowerings.largest(q.params["layers"][name])
        found.append(
            AccumulatorRange(
                name,
                signed_width(-most, most),
                signed_width(lows[name], highs[name]),
                lows[name],
                highs[name],
                mean,
                variance**0.5,
            )
        )
    return tuple(found)


class AccumulatorStudy(NamedTuple):
    """What accumulators of fewer bits do.

    Attributes:
      ranges: by layer.
      top1: accuracy in percent by width, all layers at that width.
      least: the narrowest width whose accuracy, and every wider one's, is that of 32 bits.
      energy: of one image by the model `bits` with 32 bits, with `least`, and with the width that
        each layer needed on the images.
    """

    ranges: tuple[AccumulatorRange, ...]
    top1: dict[int, float]
    least: int
    energy: tuple[float, float, float]

    def __str__(self) -> str:
        """Two tables and a summary."""
        size = max(len(layer.name) for layer in self.ranges)
        ranges = [
            (name, str(worst), str(met), f"{low:,}", f"{high:,}", f"{mean:,.0f}", f"{std:,.0f}")
            for name, worst, met, low, high, mean, std in self.ranges
        ]
        header = ("layer", "worst", "met", "min", "max", "mean", "std")
        widths = (size, 5, 4, 10, 10, 10, 10)
        accuracies = [(str(bits), f"{top1:.2f}") for bits, top1 in self.top1.items()]
        wide, narrow, own = self.energy
        saved = f"{narrow / wide - 1:+.1%}", f"{own / wide - 1:+.1%}"
        lines = [
            table(header, ranges, "<>>>>>>", ruled=False, widths=widths),
            "",
            table(("bits", "top-1"), accuracies, ">>", ruled=False, widths=(4, 6)),
            "",
            f"least width that loses nothing: {self.least} bits; bit operations of an image:",
            f"{wide:,.0f} with 32 bits, {narrow:,.0f} with {self.least} ({saved[0]}),",
            f"{own:,.0f} with the width that each layer met ({saved[1]})",
        ]
        return "\n".join(lines)


def study_accumulators(
    q: Quantized,
    batches: Sequence[Any],
    accuracy: Callable[[Any], float],
    *,
    overflow: Overflow = "saturate",
    check: Check = "sum",
    widths: Sequence[int] = WIDTHS,
    progress: Progress = lambda item, done, total: None,
) -> AccumulatorStudy:
    """Measures ranges on calibration images, and the accuracy with all accumulators at one width.

    Args:
      q: the quantized network.
      batches: calibration inputs, for the ranges.
      accuracy: of a function of (params, x) with `q.params`, in percent.
      overflow: what happens to a sum that does not fit.
      check: when.
      widths: to try, among them 32.
      progress: called with (what is being done, how much is done, how much there is).

    Returns:
      An `AccumulatorStudy`.

    Raises:
      ValueError: 32 is not among the widths, or no layer has an integer accumulator.
    """
    if 32 not in widths:
        raise ValueError(f"`widths` must have 32 to compare with; got {tuple(widths)}.")
    total = 1 + len(widths)
    progress("ranges", 0, total)
    ranges = accumulator_ranges(q, batches)
    names = [layer.name for layer in ranges]
    top1 = {}
    for done, bits in enumerate(sorted(widths)):
        progress(f"{bits} bits", 1 + done, total)
        accumulator = dict.fromkeys(names, Accumulator(bits, overflow, check))
        top1[bits] = accuracy(integer(q, accumulator=accumulator))
    least = 32
    for bits in sorted(widths, reverse=True):
        if top1[bits] != top1[32]:
            break
        least = bits
    own = {layer.name: layer.bits for layer in ranges}
    energies = [
        cost(q, accumulator_bits=bits).total.energy
        for bits in (32, dict.fromkeys(names, least), own)
    ]
    return AccumulatorStudy(ranges, top1, least, (energies[0], energies[1], energies[2]))
