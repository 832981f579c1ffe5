"""Tries to break qjax and counts what happens: `python scripts/reliability.py --out FILE`.

Every case must be survived (nothing lost, nothing wrong) or refused by one error that says why. A
case that is neither ends the script with its description and exit code 1.
"""

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax import atomic
from qjax.table import table

ROOT = Path(__file__).parents[1]
WIDTHS = {"a": 3, "b": 5}  # of the weights of two artifacts


class Case(NamedTuple):
    """What came of one case.

    Attributes:
      was_refused: by an error that names the file; otherwise it was survived.
      failure: why it was neither, empty if it was.
    """

    was_refused: bool = False
    failure: str = ""


class Group(NamedTuple):
    """Cases of one kind.

    Attributes:
      text: what is done.
      cases: of (number of cases, seed): what came of each.
    """

    text: str
    cases: Callable[[int, int], Iterator[Case]]


def network(params: Any, x: jax.Array) -> jax.Array:
    """A small network whose artifact takes some time to write."""
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["head"]


def quantized(bits: int) -> qjax.Quantized:
    """The network, quantized in the fastest way."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (64, 512), "bias": (1, 512), "head": (512, 64)}
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    recipe = qjax.recipe(8, weight_bits=bits).naive()
    return qjax.quantize(network, params, jnp.float32(rng.normal(size=(8, 64))), recipe)


# ---- Saving


def killed_saves(count: int, seed: int, loads: int = 100) -> Iterator[Case]:
    """Kills a process that replaces one artifact by another, and loads all the while.

    Args:
      count: of kills.
      seed: of their instants.
      loads: before each.
    """
    instants = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        known = {name: quantized(bits) for name, bits in WIDTHS.items()}
        for name, q in known.items():
            qjax.save(Path(folder, name), q)
        target = Path(folder, "target")
        for _ in range(count):
            with _saving(folder) as saver:
                for _ in range(loads):
                    yield _loaded(target, known)
                time.sleep(instants.uniform(0, 0.05))
                saver.kill()
            yield _loaded(target, known)
        qjax.save(target, known["a"])
        left = sorted(entry.name for entry in (*target.iterdir(), *target.parent.iterdir()))
        yield Case(failure="" if len(left) == 5 else f"saves left {left}")


def _saving(folder: str) -> subprocess.Popen:
    """A process that saves for ever, once it has begun."""
    command = [sys.executable, __file__, "--saver", folder]
    saver = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert saver.stdout is not None
    saver.stdout.readline()
    return saver


def save_for_ever(folder: str) -> None:
    """What the process does."""
    known = [qjax.load(Path(folder, name), network) for name in WIDTHS]
    for round, q in enumerate(itertools.cycle(known)):
        qjax.save(Path(folder, "target"), q)
        if round == 0:
            print("saving", flush=True)


def _loaded(path: Path, known: dict[str, qjax.Quantized]) -> Case:
    """Loads an artifact, which must be one of those that are known."""
    try:
        leaves = jax.tree.leaves(qjax.load(path, network).params)
    except Exception as error:
        return Case(failure=f"a load failed: {error!r}")
    for q in known.values():
        others = jax.tree.leaves(q.params)
        if all(np.array_equal(a, b) for a, b in zip(leaves, others, strict=True)):
            return Case()
    return Case(failure="what was loaded is neither the older artifact nor the newer one")


GROUPS = {
    "save": Group(
        "kill -9 while an artifact is replaced, and loads before and after it", killed_saves
    ),
}

# ---- The table

HEADER = ("group", "cases", "refused", "survived", "lost or unclear", "seconds")


def count(name: str, cases: int, minutes: float, seed: int) -> tuple[tuple[str, ...], list[str]]:
    """Tries a group: its row, and its failures."""
    start, found = time.monotonic(), []
    for case in GROUPS[name].cases(cases, seed):
        found.append(case)
        if time.monotonic() - start > 60 * minutes:
            break
    failures = [case.failure for case in found if case.failure]
    refused = sum(case.was_refused for case in found)
    numbers = (len(found), refused, len(found) - refused - len(failures), len(failures))
    seconds = f"{time.monotonic() - start:.0f}"
    return (GROUPS[name].text, *(f"{number:,}" for number in numbers), seconds), failures


def main() -> int:
    """Parses the options and tries the groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--groups", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), metavar="NAME")
    add("--cases", type=int, default=100, metavar="N", help="of each group (%(default)s)")
    add("--minutes", type=float, default=float("inf"), metavar="X", help="for each at most")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--out", metavar="FILE", help="write the table: docs/reliability-table.md")
    add("--saver", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.saver is not None:
        save_for_ever(arguments.saver)
    rows, failures = [], []
    for name in arguments.groups:
        row, failed = count(name, arguments.cases, arguments.minutes, arguments.seed)
        rows.append(row)
        failures += failed
    text = table(HEADER, rows, "<>>>>>")
    print(text, *failures, sep="\n")
    if arguments.out is not None:
        atomic.write(arguments.out, f"{text}\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
