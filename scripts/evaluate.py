"""Measures the tables of accuracy in the documentation, on all test images.

Every finished measurement is kept, so a run that was interrupted goes on where it stopped.

  python scripts/evaluate.py widths
  python scripts/evaluate.py mixed --models resnet20-cifar10 --seeds 0 1 2

Next to the accuracy stands the logits' error on training images outside of the calibration draw,
|f(x) - f_quantized(x)|^2 over |f(x)|^2, summed: methods are chosen by it, never by test images.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import photographs
import unlike
import zoo
from accuracy_measuring import FLOAT, Line, Measuring
from accuracy_pages import document, rows_of_markdown, show
from accuracy_tables import Table, tables

import pretrained
from qjax.atomic import write
from qjax.progress import progress_bar

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
# Tables of their own form.
PAGES = {"zoo": zoo.run, "photographs": photographs.run, "unlike": unlike.run}


def main() -> None:
    """Parses the command line, measures what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=(*tables(), *PAGES), help="which table")
    add_arguments(parser)
    arguments = parser.parse_args()
    PAGES.get(arguments.table, partial(run, arguments.table))(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a measurement can be told."""
    parser.add_argument(
        "--models",
        nargs="+",
        default=pretrained.names(),
        metavar="NAME|PATH",
        help="all reference models",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="random seeds of the calibration draw"
    )
    parser.add_argument("--calibration-size", type=int, default=1024, metavar="N", help="images")
    parser.add_argument(
        "--dataset", metavar="FOLDER", help="images by class, of the table of photographs"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows of the table (all)")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="columns of the table (all)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="docs/results-TABLE.jsonl")
    parser.add_argument(
        "--networks", type=Path, metavar="DIR", help="keep quantized networks there, and use them"
    )
    parser.add_argument("--restart", action="store_true", help="measure again what is kept")


def run(name: str, arguments: argparse.Namespace) -> None:
    """Measures what is missing of a table, writes it and prints it."""
    path = arguments.results or DOCS / f"results-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = tables()[name]
    for option, known in {"rows": table.rows, "columns": table.columns}.items():
        for given in getattr(arguments, option) or ():
            if given not in known:
                raise SystemExit(f"`--{option}` must be of {'; '.join(known)}; got {given!r}.")
    if arguments.restart:
        forget(path, arguments)
    for model in arguments.models:
        measure_missing(model, table, arguments, path)
    lines = read(path)
    text = document(table, lines, f"python scripts/evaluate.py {name}")
    write(path.with_suffix(".md"), text)
    if path.parent == DOCS:
        only = table.shown
        shown = [line for line in lines if not only or line["model"] in only]
        show(DOCS / table.page, name, rows_of_markdown(table, shown, with_error=False))
        if table.in_readme:
            short = table._replace(rows=table.in_readme)
            show(README, name, rows_of_markdown(short, shown, with_error=False))
    print(text)


def read(path: Path) -> list[Line]:
    """The measurements so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def forget(path: Path, arguments: argparse.Namespace) -> None:
    """Drops the measurements that are to be made again."""
    models = {Path(model).name for model in arguments.models}
    kept = [
        line
        for line in read(path)
        if line["model"] not in models
        or line["seed"] not in arguments.seeds
        or line["row"] not in (arguments.rows or [line["row"]])
        or line["column"] not in (arguments.columns or [line["column"]])
    ]
    write(path, "".join(json.dumps(line) + "\n" for line in kept))


def measure_missing(name: str, table: Table, arguments: argparse.Namespace, path: Path) -> None:
    """Measures what `path` does not hold yet of a model, and appends it line by line."""
    label, size = Path(name).name, arguments.calibration_size
    lines = [line for line in read(path) if line["model"] == label]
    missing = _missing(table, arguments, lines)
    asked = [line for line in lines if line["row"] != FLOAT and _is_asked_size(table, line)]
    if not missing and all(line["calibration_images"] == size for line in asked):
        return
    measuring = Measuring(name, size, arguments.networks)
    _refuse_other_size(asked, measuring.used, path, label)
    with progress_bar(label) as progress:
        for done, (row, column, seed) in enumerate(missing):
            progress(f"{row}, {column}, draw {seed}", done, len(missing))
            line = {"model": label, "row": row, "column": column, "seed": seed}
            if row == FLOAT:
                found = measuring.of_float()
            else:
                found = measuring.of(table.way(row, column), seed, table.error)
            append(path, line | found)


def _is_asked_size(table: Table, line: Line) -> bool:
    """Whether a measurement has as many calibration images as the command line says."""
    key = line["row"], line["column"]
    return key not in table.recipes or table.way(*key).images is None


def _missing(
    table: Table, arguments: argparse.Namespace, lines: Sequence[Line]
) -> list[tuple[str, str, int]]:
    """The cells that were asked for and are not among some measurements."""
    keys = [
        (row, column)
        for row, column in table.recipes
        if row in (arguments.rows or table.rows) and column in (arguments.columns or [column])
    ]
    wanted = [(FLOAT, FLOAT, 0), *((*key, seed) for seed in arguments.seeds for key in keys)]
    held = {(line["row"], line["column"], line["seed"]) for line in lines}
    return [key for key in wanted if key not in held]


def _refuse_other_size(lines: Sequence[Line], used: int, path: Path, label: str) -> None:
    for line in lines:
        if line["calibration_images"] != used:
            raise SystemExit(
                f"{path} has {label} with {line['calibration_images']} calibration images, not "
                f"{used}; pass --restart to measure it again, or --results to keep both."
            )


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Keeps a measurement."""
    with path.open("a") as file:
        print(json.dumps(line), file=file)


if __name__ == "__main__":
    sys.exit(main())
