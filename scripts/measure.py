"""Timing: in a process of its own, side by side, and on which device."""

import argparse
import concurrent.futures
import logging
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from qjax.integer.processor import dot_extension, name_of_processor
from qjax.threads import cores


class Measured(NamedTuple):
    """What one variant takes.

    Attributes:
      first: seconds of the first call, compilation included.
      steady: seconds of a later call, the median.
      peak: bytes of memory that its process held at most.
      losses: values by which two variants can be told to compute the same.
    """

    first: float
    steady: float
    peak: int
    losses: list[float]


def in_own_process(measure: Callable[..., Any], arguments: argparse.Namespace) -> Measured:
    """Runs a measurement, which returns (first, steady, losses), in a fresh process."""
    fields = {key: value for key, value in vars(arguments).items() if key != "run"}
    return in_fresh_process(_with_peak, measure, argparse.Namespace(**fields))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def cpu_seconds() -> float:
    """CPU time of this process so far, all threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes() -> int:
    """The most memory that this process held at one time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def expect_random_images() -> None:
    """Silences that calibration images are unlike those of training, as random ones are."""
    logging.getLogger("qjax.fit.suitability").setLevel(logging.ERROR)


def _with_peak(measure: Callable[..., Any], arguments: argparse.Namespace) -> Measured:
    expect_random_images()
    first, steady, losses = measure(arguments)
    peak = peak_bytes()
    return Measured(first, steady, peak, losses)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of `repeats` later ones (NaN if none)."""
    seconds = [_seconds(function) for _ in range(repeats + 1)]
    return seconds[0], statistics.median(seconds[1:]) if repeats else math.nan


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


class Times(NamedTuple):
    """What variants of one computation take.

    Attributes:
      first: seconds of each one's first call, compilation included.
      rounds: seconds of each one's later calls, in which all took turns.
    """

    first: list[float]
    rounds: list[list[float]]

    @property
    def median(self) -> list[float]:
        """Seconds of each one's later calls."""
        return [statistics.median(column) for column in zip(*self.rounds, strict=True)]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the first variant each one is."""
        return [self.speedup(variant, 0) for variant in range(len(self.first))]

    @property
    def least(self) -> list[float]:
        """Seconds of each one's fastest call, which other processes disturb least."""
        return [min(column) for column in zip(*self.rounds, strict=True)]

    def speedup(self, variant: int, base: int) -> float:
        """The median of time(base) / time(variant) over the rounds."""
        return statistics.median(row[base] / row[variant] for row in self.rounds)


def side_by_side(variants: list[Callable[[], Any]], seconds: float) -> Times:
    """Times variants in turns, so that what else the machine does meets all of them."""
    first = list(map(_seconds, variants))
    rounds = [list(map(_seconds, variants))]
    end = time.perf_counter() + seconds * len(variants)
    while len(rounds) < 5 or time.perf_counter() < end:
        rounds.append(list(map(_seconds, variants)))
    return Times(first, rounds)


def device() -> str:
    """The device, with the instructions that matter."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    count, extension = cores(), dot_extension() or "no int8 dot instructions"
    return f"{count} core{'s' * (count > 1)} of {name_of_processor()} with {extension}"
