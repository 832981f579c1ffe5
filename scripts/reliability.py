"""Tries to break qjax and counts what happens: `python scripts/reliability.py --out FILE`.

Every case must be survived (nothing lost, nothing wrong) or refused by one error that says why. A
case that is neither ends the script with its description and exit code 1.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import reliability_artifacts as artifacts
import reliability_commands as commands
from markdown_tables import markdown_table
from reliability_artifacts import Case

from qjax import atomic
from qjax.table import table


class Group(NamedTuple):
    """Cases of one kind.

    Attributes:
      text: what is done.
      cases: of (number of cases, seed): what came of each.
      count: of cases by default.
    """

    text: str
    cases: Callable[[int, int], Iterator[Case]]
    count: int = 2000


GROUPS = {
    "save": Group(
        "kill -9 while an artifact is replaced, 100 loads before each and one after it",
        artifacts.killed_saves,
        100,
    ),
    "quantize": Group(
        "kill -9 of qjax.quantize with a checkpoint, which then goes on",
        artifacts.killed_runs,
        100,
    ),
    "signals": Group("Ctrl-C and SIGTERM in qjax quantize", commands.signals, 50),
    "manifest": Group("manifests with changed entries, hashes right", artifacts.damaged_manifests),
    "guided": Group("manifests changed as coverage leads (Atheris)", artifacts.guided_manifests),
    "arrays": Group("arrays changed, hashes put right", artifacts.damaged_arrays),
    "recipes": Group("recipe files with changed entries or bytes", commands.damaged_recipes),
    "images": Group(".npz datasets with changed arrays or bytes", commands.damaged_images),
    "weights": Group(
        "safetensors of a network with changed tensors or bytes", commands.damaged_weights
    ),
    "options": Group("command lines with options and values at random", commands.random_options),
}

# ---- The table

TEXT = """\
# Reliability

A case is survived where nothing is lost or wrong: what is loaded is the older artifact or the
newer one, a run that goes on ends with the bytes of a whole one, and a damaged artifact that
loads is of use and is saved again as it was read (another number in place of a scale is another
network, which nothing can tell). A case is refused by a `ValueError` of one line that names the
file. Hashes tell of accidents and not of attackers: the damage here has its hashes put right.
Nothing that is read is ever executed.

{table}

`{command}`
"""
HEADER = ("group", "cases", "refused", "survived", "lost or unclear", "seconds")
ALIGN = "<>>>>>"


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
    parser = argparse.ArgumentParser(description="Tries to break qjax.")
    add = parser.add_argument
    add("--groups", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), metavar="NAME")
    counts = ", ".join(f"{name} {group.count}" for name, group in GROUPS.items())
    add("--cases", type=int, metavar="N", help=f"of each group ({counts})")
    add("--minutes", type=float, default=float("inf"), metavar="X", help="most minutes per group")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--out", metavar="FILE", help="write the table: docs/reliability.md")
    add("--role", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        role, folder = arguments.role
        artifacts.ROLES[role](folder)
        return 0
    rows, failures = [], []
    for name in arguments.groups:
        print(GROUPS[name].text, flush=True)
        row, failed = count(
            name, arguments.cases or GROUPS[name].count, arguments.minutes, arguments.seed
        )
        rows.append(row)
        failures += failed
    print("", table(HEADER, rows, ALIGN), *failures, sep="\n")
    if arguments.out is not None:
        command = shlex.join(["python", "scripts/reliability.py", *sys.argv[1:]])
        text = TEXT.format(table=markdown_table(HEADER, rows, ALIGN), command=command)
        atomic.write(arguments.out, text)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
