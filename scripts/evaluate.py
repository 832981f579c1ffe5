"""Measures the tables of accuracy in the documentation, on all test images.

Every finished measurement is kept, so a run that was interrupted goes on where it stopped.

  python scripts/evaluate.py widths
  python scripts/evaluate.py mixed --models resnet20-cifar10 --seeds 0 1 2

Next to the accuracy stands the logits' error on training images outside of the calibration draw,
|f(x) - f_quantized(x)|^2 over |f(x)|^2, summed: methods are chosen by it, never by test images.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import zoo

import pretrained
import qjax
from pretrained import datasets
from qjax.artifact import stored_bytes
from qjax.atomic import write
from qjax.fit.data_free import UnknownRangeError
from qjax.fit.ends import search_ends
from qjax.graph.layers import shapes_of
from qjax.progress import progress_bar
from qjax.quantize import BATCH_SIZE
from qjax.recipe import Recipe
from qjax.run.tap import float_layers
from qjax.study.questions import ways_to_ranges
from qjax.tuning.held_out import HeldOut
from qjax.tuning.tune import Settings, run_tuning

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
RESULTS = DOCS / "results.md"
HELD_OUT = 2000  # training images
WIDTHS = (8, 6, 5, 4, 3, 2)
FORMATS = {"W6A6": (6, 6), "W4A8": (4, 8), "W3A8": (3, 8), "W2A8": (2, 8)}
FORMATS |= {"W4A4": (4, 4), "W3A3": (3, 3)}
FIXED_POINT_WIDTHS, RANGE_WIDTHS = (8, 6, 4), (8, 4)
FLOAT, UNIFORM = "float", "uniform"
LONG = """medians over the layers of the SQNR of kernels and outputs, and
of what outputs have more than with uniform weights of that width; top-1 in percent on all test
images; bytes of kernels, with scales and tables, and of biases; and the error"""
INPUTS: dict[str, Any] = {"outputs": None}
TUNED: dict[str, tuple[int, dict[str, Any]]] = {
    "W4A4, inputs and outputs": (4, {}),
    "W3A3, inputs and outputs": (3, {}),
    "W4A4, inputs": (4, INPUTS),
    "W4A4, inputs, first and last layer at 8 bits": (4, INPUTS | {"first_last_bits": 8}),
}
TUNING: dict[str, dict[str, Any]] = {
    "quantized": {},
    "ranges by the end": {"ends": 2},
    "tuned": {"is_tuned": True},
    "ranges by the end, tuned": {"ends": 2, "is_tuned": True},
}
FINEST = ", per channel, logits by their probabilities"
ERRORS = {
    "error": "|f(x) − f̂(x)|² / |f(x)|² of the logits",
    "plain": "KL(softmax(f(x)) ‖ softmax(f̂(x))) in nats",
}
TUNED_ON = 4096  # unlabeled training images, those of the calibration among them
PUBLIC = "resnet20-cifar10.torch.safetensors"


PAGES = {"zoo": zoo.run}  # tables of their own form


class Way(NamedTuple):
    """A way to quantize and to evaluate.

    Attributes:
      recipe: how to quantize.
      has_images: whether there are images to calibrate on.
      arithmetic: of integers, see `qjax.integer`; None for fake quantization.
      ends: layers whose ranges are searched again, see `Recipe.end_search`.
      is_tuned: whether scales and biases are tuned then, see `qjax.tune`.
    """

    recipe: Recipe
    has_images: bool = True
    arithmetic: str | None = None
    ends: int = 0
    is_tuned: bool = False


class Table(NamedTuple):
    """One table for every model.

    Attributes:
      title: its heading.
      rows: names of the rows.
      recipes: a recipe or a way by (row, column), in the order of the columns.
      shown: the models that docs/results.md shows; all by default.
      in_readme: the rows of these that README shows.
      is_long: whether a column is a block of lines, which show what was measured.
      error: what stands in brackets: a field of the measurements.
    """

    title: str
    rows: Sequence[str]
    recipes: Mapping[tuple[str, str], Recipe | Way]
    shown: Sequence[str] = ()
    in_readme: Sequence[str] = ()
    is_long: bool = False
    error: str = "error"


def tables() -> dict[str, Table]:
    """The tables by name."""
    parts: dict[str, dict[str, Any]] = {
        "weights": {"inputs": None, "outputs": None},
        "weights, inputs": {"outputs": None},
        "weights, inputs, outputs": {},
    }
    widths = {
        (part, f"{bits} bits"): qjax.recipe(bits, **fields)
        for part, fields in parts.items()
        for bits in WIDTHS
    }
    columns: dict[str, dict[str, Any]] = {
        "inputs and outputs": {},
        "inputs": {"outputs": None},
        "inputs, first and last layer at 8 bits": {"outputs": None, "first_last_bits": 8},
    }
    mixed = {
        (name, column): qjax.recipe(activation_bits, weight_bits=weight_bits, **fields)
        for name, (weight_bits, activation_bits) in FORMATS.items()
        for column, fields in columns.items()
    }
    finer: dict[str, Any] = {"activation_granularity": "per_channel"}
    for bits in (6, 4, 3):
        for column, fields in columns.items():
            row = f"W{bits}A{bits}, activations per channel"
            mixed[row, column] = qjax.recipe(bits, **fields, **finer)
    for bits in (4, 3):
        row = f"W{bits}A{bits}, logits by their probabilities"
        mixed[row, "inputs and outputs"] = qjax.recipe(bits, logits=True)
    mixed["W4A4, both", "inputs and outputs"] = qjax.recipe(4, logits=True, **finer)
    used = Recipe()
    steps: dict[str, dict[str, Any]] = {
        "extremes, nearest codes": {},
        "+ ranges by the tensor's error": {"range_method": "mse"},
        "+ ranges by the output's error": {"range_method": used.range_method},
        "+ refined grids": {"refinements": used.refinements},
        "+ bias correction": {"bias_correction": True},
        "+ sequential fitting": {"sequential": True},
        "+ GPTQ": {"rounding": "gptq"},
        "+ one least-squares fit": {"reconstructions": 1},
        "+ fits to what the activation shows": {"reconstructions": 3},
        "+ coordinate sweeps": {"sweeps": 2},
        "+ equalized channels": {"equalize": True},
        "+ logits by their probabilities": {"logits": True},
    }
    formats = {
        "W4A4, inputs and outputs": qjax.recipe(4),
        "W3A8, inputs and outputs": qjax.recipe(8, weight_bits=3),
    }
    ablation = {}
    for column, full in formats.items():
        recipe = dataclasses.replace(full.naive(), refinements=0)
        for row, changes in steps.items():
            recipe = dataclasses.replace(recipe, **changes)
            ablation[row, column] = recipe
    weights: dict[str, Any] = {"inputs": None, "outputs": None}
    kernels: dict[str, dict[str, Any]] = {
        UNIFORM: {},
        "uniform, asymmetric": {"symmetric": False},
        "kmeans": {"format": "kmeans"},
        "kmeans per tensor": {"format": "kmeans", "granularity": "per_tensor"},
        **{name: {"format": name} for name in ("power_of_two", "apot", "quantile", "nf4")},
    }
    codebooks = {
        (row, f"{bits} bits"): qjax.recipe(8, weights=qjax.QuantSpec(bits, **fields), **weights)
        for bits in (3, 4, 2)
        for row, fields in kernels.items()
        if row != "nf4" or bits == 4
    }
    scales: dict[str, dict[str, Any]] = {
        "free scales": {},
        "powers of two": {"fixed_point": True},
        "powers of two, integers and shifts": {"fixed_point": True},
    }
    fixed_point = {
        (row, f"{bits} bits"): Way(
            qjax.recipe(bits, **fields), arithmetic="shift" if "shifts" in row else None
        )
        for bits in FIXED_POINT_WIDTHS
        for row, fields in scales.items()
    }
    ranges = {
        (name, f"{bits} bits"): Way(recipe, has_images)
        for bits in RANGE_WIDTHS
        for name, recipe, has_images in ways_to_ranges(qjax.recipe(bits))
    }
    finest: dict[str, Any] = {"activation_granularity": "per_channel"}
    tuning = {}
    for column, (bits, fields) in TUNED.items():
        logits = {} if fields else {"logits": True}
        for name, more in {"": {}, FINEST: {**finest, **logits}}.items():
            recipe = qjax.recipe(bits, **fields, **more)
            for row, changes in TUNING.items():
                tuning[row + name, column] = Way(recipe, **changes)
    return {
        "tuning": Table(
            "Ranges by the end, and tuned scales",
            [row + name for name in ("", FINEST) for row in TUNING],
            tuning,
            error="plain",
        ),
        "codebooks": Table("Formats of weights", list(kernels), codebooks, is_long=True),
        "fixed-point": Table("Powers of two against free scales", list(scales), fixed_point),
        "ranges": Table(
            "Static, dynamic and weight-only, with images and without",
            list(dict.fromkeys(row for row, _ in ranges)),
            ranges,
        ),
        "ablation": Table(
            "Ablation: each ingredient added to those above it (the default: all but the last two)",
            list(steps),
            ablation,
        ),
        "widths": Table("Top-1 by bit width", list(parts), widths),
        "mixed": Table(
            "Top-1 by widths of weights and activations",
            list(dict.fromkeys(row for row, _ in mixed)),
            mixed,
            shown=(PUBLIC,),
            in_readme=("W6A6", "W4A8", "W4A4", "W4A4, both", "W3A3"),
        ),
    }


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
    columns = list(dict.fromkeys(column for _, column in table.recipes))
    for option, known in {"rows": table.rows, "columns": columns}.items():
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
        show(RESULTS, name, rows_of_markdown(table, shown, with_error=False))
        if table.in_readme:
            short = table._replace(rows=table.in_readme)
            show(README, name, rows_of_markdown(short, shown, with_error=False))
    print(text)


def read(path: Path) -> list[dict[str, Any]]:
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
    label = Path(name).name
    keys = [
        (row, column)
        for row, column in table.recipes
        if row in (arguments.rows or table.rows) and column in (arguments.columns or [column])
    ]
    wanted = [(FLOAT, FLOAT, 0), *((*key, seed) for seed in arguments.seeds for key in keys)]
    lines = [line for line in read(path) if line["model"] == label]
    held = {(line["row"], line["column"], line["seed"]) for line in lines}
    missing = [key for key in wanted if key not in held]
    size = arguments.calibration_size
    if not missing and all(line.get("calibration_images", size) == size for line in lines):
        return
    model = pretrained.load(name)
    images = datasets.load(model.dataset, "train").images
    used = min(size, len(images) - 1)
    for line in lines:
        if line.get("calibration_images", used) != used:
            raise SystemExit(
                f"{path} has {label} with {line['calibration_images']} calibration images, not "
                f"{used}; pass --restart to measure it again, or --results to keep both."
            )
    if not missing:
        return
    test = datasets.load(model.dataset, "test")
    accuracy = partial(
        qjax.top1, images=test.images, labels=test.labels, preprocess=model.preprocess
    )
    last: tuple[Any, qjax.Quantized, float] | None = None
    searched: dict[int, qjax.Quantized] = {}
    with progress_bar(label) as progress:
        for done, (row, column, seed) in enumerate(missing):
            progress(f"{row}, {column}, draw {seed}", done, len(missing))
            line = {"model": label, "row": row, "column": column, "seed": seed}
            if row == FLOAT:
                line["top1"] = accuracy(model.apply_fn, model.params)
            else:
                drawn = datasets.calibration_draw(np.arange(len(images)), used, seed)
                others = np.setdiff1d(np.arange(len(images)), drawn)
                others = np.random.default_rng(seed).permutation(others)
                others, more = others[:HELD_OUT], others[HELD_OUT : HELD_OUT + TUNED_ON - used]
                way = table.recipes[row, column]
                way = way if isinstance(way, Way) else Way(way)
                line["calibration_images"] = used
                key = way.recipe, way.has_images, seed
                if last is None or last[0] != key:
                    calibration: Any = model.preprocess(images[drawn])
                    given = calibration if way.has_images else shapes_of(calibration)
                    about = [label, way.recipe.to_json(), way.has_images, used, seed]
                    work = partial(qjax.quantize, model.apply_fn, model.params, given, way.recipe)
                    try:
                        q, seconds = network_of(arguments.networks, about, model, work)
                    except UnknownRangeError:  # no batch norm: the table has a dash
                        missed = {"top1": None, "error": None, "test_images": len(test.images)}
                        append(path, line | missed)
                        continue
                    last = key, q, seconds
                    searched.clear()
                _, q, line["seconds"] = last
                if way.ends or way.is_tuned:
                    start = time.perf_counter()
                    if way.ends not in searched:
                        batches = model.preprocess(images[drawn])
                        searched[way.ends] = with_ends(q, model.params, batches, way.ends)
                    q = searched[way.ends]
                    if way.is_tuned:
                        unlabeled = model.preprocess(images[np.concatenate([drawn, more])])
                        found = run_tuning(
                            q, model.apply_fn, model.params, unlabeled, Settings(seed=seed)
                        )
                        q, line["is_kept"] = found.q, found.is_kept
                    line["more_seconds"] = time.perf_counter() - start
                line |= {
                    "weight_db": [record.weight_sqnr_db for record in q.report],
                    "output_db": [record.output_sqnr_db for record in q.report],
                    "bytes": stored_bytes(q),
                }
                run = q if way.arithmetic is None else on_integers(q, way.arithmetic)
                line["error"] = logits_error(model, run, model.preprocess(images[others]))
                if table.error == "plain":
                    held_out = model.preprocess(images[others])
                    held_out = HeldOut(model.apply_fn, model.params, held_out)
                    line |= held_out.divergences(q)._asdict()
                line["top1"] = accuracy(run.apply_fn, q.params)
                if run is not q:
                    line["other_logits"] = differing(q, run, model.preprocess, test.images)
            append(path, line | {"test_images": len(test.images)})


def network_of(
    folder: Path | None,
    about: Sequence[Any],
    model: pretrained.Pretrained,
    work: Callable[[], qjax.Quantized],
) -> tuple[qjax.Quantized, float]:
    """A quantized network and the seconds that it took, from a folder where it is there.

    Args:
      folder: of networks; None to keep none.
      about: what the network depends on, as JSON values.
      model: the float network.
      work: makes the quantized one.
    """
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = None if folder is None else folder / f"{name}.json"
    if folder is not None and file is not None and file.exists():
        return qjax.load(folder / name, model.apply_fn), json.loads(file.read_text())["seconds"]
    start = time.perf_counter()
    q = work()
    jax.block_until_ready(q.params)
    seconds = time.perf_counter() - start
    if folder is not None and file is not None:
        folder.mkdir(parents=True, exist_ok=True)
        qjax.save(folder / name, q)
        write(file, json.dumps({"seconds": seconds, "about": about}))
    return q, seconds


def with_ends(
    q: qjax.Quantized, params: Any, calibration: np.ndarray, count: int
) -> qjax.Quantized:
    """What `qjax.quantize` with `Recipe.end_search` gives, without fitting the layers again."""
    batches = calibration.reshape(-1, BATCH_SIZE, *calibration.shape[1:])
    network = q.apply_fn.network(batches[0])
    floats = float_layers(network, params)
    found = search_ends(network, floats, q.params, [jnp.asarray(batches)], count, lambda *_: None)
    return q._replace(params=found)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Keeps a measurement."""
    with path.open("a") as file:
        print(json.dumps(line), file=file)


def on_integers(q: qjax.Quantized, arithmetic: str) -> qjax.Quantized:
    """The same network on integers."""
    return q._replace(apply_fn=qjax.integer(q, arithmetic=arithmetic))


def differing(
    q: qjax.Quantized, run: qjax.Quantized, preprocess: Any, images: Any, batch: int = 250
) -> int:
    """The images for which two evaluations of a network give other logits."""
    count = 0
    for start in range(0, len(images), batch):
        x = preprocess(images[start : start + batch])
        logits = (np.asarray(one.apply_fn(q.params, x)) for one in (q, run))
        count += int(np.sum(np.any(np.not_equal(*logits), axis=-1)))
    return count


def logits_error(
    model: pretrained.Pretrained, q: qjax.Quantized, x: Any, batch: int = 250
) -> float:
    """What quantization changes in the logits, as a share of their energy."""
    apply_fn = jax.jit(model.apply_fn)
    noise = signal = 0.0
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        logits = np.asarray(apply_fn(model.params, part), np.float64)
        noise += float(np.sum((np.asarray(q.apply_fn(q.params, part)) - logits) ** 2))
        signal += float(np.sum(logits**2))
    return noise / signal


def document(table: Table, lines: Sequence[dict[str, Any]], command: str) -> str:
    """The table as a page."""
    calibrated = [line for line in lines if line["row"] != FLOAT]
    images = sorted({line["calibration_images"] for line in calibrated})
    counts = " or ".join(f"{n:,}" for n in images)
    shown = (
        LONG if table.is_long else "top-1 in percent on all test images, and in brackets the error"
    )
    return f"""# {table.title}

Measured by `{command}`: {shown}
{ERRORS[table.error]} on up to {HELD_OUT:,} training images not calibrated on.
{counts} calibration images; means over the draws.{_agreement(lines)}

{rows_of_markdown(table, lines, with_error=True)}
"""


def _agreement(lines: Sequence[dict[str, Any]]) -> str:
    """Says for how many images integers and fake quantization give other logits."""
    counted = [line for line in lines if "other_logits" in line]
    if not counted:
        return ""
    images, others = (sum(line[key] for line in counted) for key in ("test_images", "other_logits"))
    return (
        f" In {len(counted)} networks on integers {others:,} of {images:,} images have other "
        "logits than by fake quantization."
    )


def rows_of_markdown(table: Table, lines: Sequence[dict[str, Any]], with_error: bool) -> str:
    """The table, all models in one."""
    columns = list(dict.fromkeys(column for _, column in table.recipes))
    if table.is_long:
        return long_rows(table, lines, columns)
    text = [
        f"| | float | draws | | {' | '.join(columns)} |",
        f"|---|---|---|---|{'---|' * len(columns)}",
    ]
    error = table.error if with_error else None
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == model]
        reference = next(line["top1"] for line in mine if line["row"] == FLOAT)
        draws = len({line["seed"] for line in mine if line["row"] != FLOAT})
        head = f"{model} | {reference:.2f} | {draws}"
        for row in table.rows:
            cells = [cell(mine, row, column, error) for column in columns]
            if any(cells):
                text.append(f"| {head} | {row} | {' | '.join(cells)} |")
                head = " | | "
    return "\n".join(text)


def long_rows(table: Table, lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A line for each row of each column, decibels as medians over the layers.

    The gain is the median over the layers of what the output has more than with uniform weights.
    """
    text = [
        "| | float | | | weights dB | output dB | gain dB | top-1 | logits' error | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = {(line["row"], line["column"]): line for line in lines if line["model"] == model}
        head = f"{model} | {mine[FLOAT, FLOAT]['top1']:.2f}"
        for column in sorted(columns, reverse=True):
            label = column
            for row in table.rows:
                if (line := mine.get((row, column))) is None:
                    continue
                pairs = zip(line["output_db"], mine[UNIFORM, column]["output_db"], strict=True)
                gains = [ours - theirs for ours, theirs in pairs]
                weights_db, output_db, gain = map(
                    statistics.median, (line["weight_db"], line["output_db"], gains)
                )
                text.append(
                    f"| {head} | {label} | {row} | {weights_db:.1f} | {output_db:.1f} | {gain:+.1f}"
                    f" | {line['top1']:.2f} | {line['error']:.1e} | {line['bytes']:,} |"
                )
                head, label = " | ", ""
    return "\n".join(text)


def cell(lines: Sequence[dict[str, Any]], row: str, column: str, error: str | None) -> str:
    """Means over the draws; in brackets those of a field of the measurements, if one is named."""
    found = [line for line in lines if (line["row"], line["column"]) == (row, column)]
    if not found:
        return ""
    if found[0]["top1"] is None:
        return "–"
    top1 = f"{statistics.mean(line['top1'] for line in found):.2f}"
    if error is None:
        return top1
    return f"{top1} ({statistics.mean(line[error] for line in found):.1e})"


def show(page: Path, name: str, text: str) -> None:
    """Replaces what stands on a page between the marks of a table, where it has them."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, mark, rest = page.read_text(encoding="utf-8").partition(start)
    if mark:
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"{page} has {start.strip()} but not {end} after it.")
        write(page, f"{before}{start}\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
