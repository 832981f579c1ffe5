"""The benchmark of a fresh process: `benchmark.py startup`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from count_programs import CALLS
from measure import device

from pretrained import datasets
from qjax.table import table

ROOT = Path(__file__).parents[1]
COMPARED = {  # row: row of the older checkout
    "quantize.py, empty cache": "quantize.py, older",
    "quantize.py, warm cache": "quantize.py, older",
    **{f"{call} qjax.quantize": f"{call} qjax.quantize, older" for call in CALLS},
}
HEADER = ("", "wall", "CPU", "peak memory", "programs", "compiling", "wall ratio", "CPU ratio")


class Used(NamedTuple):
    """What a process, or a call within one, takes.

    Attributes:
      wall: seconds.
      cpu: seconds, of all threads.
      peak: bytes of memory that the process held at most.
      programs: how many were compiled; None where that is not counted.
      compiling: seconds in which something was traced, lowered or compiled.
    """

    wall: float
    cpu: float
    peak: int | None
    programs: int | None
    compiling: float | None


Round = dict[str, Used]


def add_startup(commands: Any) -> None:
    """Adds the command `startup`."""
    text = "what compilation takes of a fresh process, with and without the compilation cache"
    parser = commands.add_parser("startup", help=text, description=text)
    add = parser.add_argument
    add("--model", default="resnet20-digits", metavar="NAME|PATH", help="(%(default)s)")
    add("--bits", type=int, default=8, metavar="N", help="width of all tensors (%(default)s)")
    add("--against", metavar="PATH", help="an older checkout to compare with")
    add("--repeats", type=int, default=3, metavar="N", help="rounds for the medians (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    parser.set_defaults(run=run_startup)


def run_startup(arguments: argparse.Namespace) -> None:
    """Measures all variants in turns, each in a process of its own, and prints the table."""
    if arguments.repeats < 1:
        raise SystemExit(f"`--repeats` must be at least 1; got {arguments.repeats}.")
    older = arguments.against and Path(arguments.against).resolve()
    if older and not (older / "scripts" / "quantize.py").is_file():
        raise SystemExit(f"`--against` must be a checkout of qjax; got {arguments.against!r}.")
    rounds = []
    for _ in range(arguments.repeats):
        rounds.append(measure_round(arguments.model, arguments.bits, older))
    print(
        f"{arguments.model}, {arguments.bits} bits, {device()}, "
        f"medians over rounds in which all took turns: {len(rounds)}\n"
    )
    rows = [(name, summarize(rounds, name)) for name in rounds[0]]
    cells = [(name, *_cells(median), *_ratios(rounds, name)) for name, median in rows]
    columns = len(HEADER) if older else len(HEADER) - 2
    print(table(HEADER[:columns], [row[:columns] for row in cells], "<>>>>>>>"[:columns]))
    print("\ncompiling: seconds in which something was traced, lowered or compiled")
    if older:
        print(f"ratio: to the same of {older},\nmedian over the rounds")
    if arguments.json:
        medians = {name: median._asdict() for name, median in rows}
        taken = [{name: used._asdict() for name, used in each.items()} for each in rounds]
        result = {"model": arguments.model, "bits": arguments.bits, "against": arguments.against}
        print(json.dumps(result | {"medians": medians, "rounds": taken}))


def measure_round(model: str, bits: int, older: Path | None) -> Round:
    """Runs every variant once."""
    found = {}
    options = ["--model", model, "--bits", str(bits), "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        # Decoded images are not what is measured: they stay where they are.
        (Path(folder) / "datasets").symlink_to(datasets.cache_dir() / "datasets")
        for name in ("quantize.py, empty cache", "quantize.py, warm cache"):
            found[name] = run_script(ROOT, options, {"QJAX_CACHE_DIR": folder})
    if older:
        found["quantize.py, older"] = run_script(older, options, {})
    calls = count_in_own_process(ROOT, model, bits)
    found |= {f"{call} qjax.quantize": used for call, used in calls.items()}
    if older:
        calls = count_in_own_process(older, model, bits)
        found |= {f"{call} qjax.quantize, older": used for call, used in calls.items()}
    return found


def run_script(checkout: Path, options: list[str], variables: dict[str, str]) -> Used:
    """Runs `scripts/quantize.py` of a checkout."""
    command = [sys.executable, str(checkout / "scripts" / "quantize.py"), *options]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=_environment(checkout) | variables, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}.")
    return Used(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, None, None)


def count_in_own_process(checkout: Path, model: str, bits: int) -> dict[str, Used]:
    """Runs `count_programs.py` in a fresh process that imports a checkout, without any cache."""
    script = Path(__file__).with_name("count_programs.py")
    command = [sys.executable, str(script), model, str(bits)]
    environment = _environment(checkout)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {name: Used(*fields) for name, fields in json.loads(done.stdout).items()}


def summarize(rounds: list[Round], name: str) -> Used:
    """The median of every field."""
    columns = zip(*(used[name] for used in rounds), strict=True)
    medians: list[Any] = [
        None if None in values else statistics.median(values) for values in columns
    ]
    return Used(*medians)


def _ratios(rounds: list[Round], name: str) -> tuple[str, str]:
    """Of wall and CPU seconds to the older checkout's, by round; the median."""
    older = COMPARED.get(name)
    if older not in rounds[0]:
        return "", ""
    fields = ("wall", "cpu")
    ratios = [[getattr(r[name], f) / getattr(r[older], f) for r in rounds] for f in fields]
    wall, cpu = (f"{statistics.median(values):.2f}" for values in ratios)
    return wall, cpu


def _cells(used: Used) -> tuple[str, ...]:
    return (
        f"{used.wall:.1f} s",
        f"{used.cpu:.1f} s",
        "" if used.peak is None else f"{used.peak / 1e6:.0f} MB",
        "" if used.programs is None else f"{used.programs:.0f}",
        "" if used.compiling is None else f"{used.compiling:.1f} s",
    )


def _environment(*folders: Path) -> dict[str, str]:
    """This process's, with these folders to import from first and no cache of JAX's own."""
    others = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, folders), *([others] if others else [])])
    mine = {name: v for name, v in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    return mine | {"PYTHONPATH": path}
