"""A large network on few photographs: agreement with the float network, seconds and memory."""

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from markdown_tables import markdown_table
from measure import cpu_seconds, in_fresh_process, peak_bytes
from zoo import error_db

import pretrained
import qjax
from pretrained import datasets
from qjax.atomic import write
from qjax.kept import Kept
from qjax.table import table

RESULTS = Path(__file__).parent.parent / "docs" / "results-photographs.jsonl"
BATCH = 62  # test images at a time
DEPTHWISE: dict[str, Any] = {"overrides": {"*depthwise*": {"weight_bits": 8}}}
RECIPES: dict[str, qjax.Recipe] = {
    "W8A8, naive": qjax.recipe(8).naive(),
    "W8A8": qjax.recipe(8),
    "W6A8": qjax.recipe(8, weight_bits=6),
    "W4A8": qjax.recipe(8, weight_bits=4),
    "W4A8, depthwise at 8 bits": qjax.recipe(8, weight_bits=4, **DEPTHWISE),
    "W4A8, equalized": qjax.recipe(8, weight_bits=4, equalize=True),
    "W4A8, equalized, depthwise at 8 bits": qjax.recipe(
        8, weight_bits=4, equalize=True, **DEPTHWISE
    ),
}
HEADER = ("recipe", "top-1", "agreement", "logits dB", "held-out dB", "CPU s", "GB")
ALIGN = "<>>>>>>"

TEXT = """\
# A large network on photographs

`python scripts/evaluate.py photographs --models {model} --dataset FOLDER
--calibration-size {size}`:
{size} images of `train` in FOLDER to calibrate on, all {tested} of `test` to test, where the float
network has {top1:.1f} % top-1. One standard error of a share of them is at most two points.

* *agreement*: test images for which both networks find the same class, in percent.
* *logits dB*: |f(x) - f̂(x)|² / |f(x)|² on the test images; less is better.
* *held-out dB*: the same on the {held_out} images of `train` that were not calibrated on, by which
  recipes can be chosen.
* *CPU s*: CPU time of `qjax.quantize` in a fresh process, compilation included.
* *GB*: the most memory that it held.

{table}
"""


def run(arguments: argparse.Namespace) -> None:
    """Measures the recipes that are missing, each in a process of its own; writes the page."""
    [model] = arguments.models
    dataset, size = arguments.dataset, arguments.calibration_size
    path = arguments.results or RESULTS
    if arguments.restart:
        path.unlink(missing_ok=True)
    label = Path(model).name
    kept = Kept(path, {"model": label, "calibration_images": size})
    known = {}
    for name in arguments.rows or RECIPES:
        print(name, flush=True)
        work = partial(in_fresh_process, measure, model, dataset, size, name)
        known[name] = kept.of(name, work)
    rows = [row(name, found) for name, found in known.items()]
    print(table(HEADER, rows, ALIGN))
    write(path.with_suffix(".md"), document(label, size, known))


def measured(results: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the measurements depend on, and what is kept of the recipes."""
    about, *lines = map(json.loads, results.read_text().splitlines())
    return about, dict(lines)


def measure(model_name: str, dataset: str, size: int, recipe: str) -> dict[str, Any]:
    """Quantizes the network by one recipe: what came of it, as JSON values."""
    model = pretrained.load(model_name)
    images, test = datasets.load(dataset, "train").images, datasets.load(dataset, "test")
    drawn = datasets.calibration_draw(np.arange(len(images)), size, 0)
    others = images[np.setdiff1d(np.arange(len(images)), drawn)]
    calibration = model.preprocess(images[drawn])
    before = cpu_seconds()
    q = qjax.quantize(model.apply_fn, model.params, calibration, RECIPES[recipe])
    jax.block_until_ready(q.params)
    found = {"seconds": cpu_seconds() - before, "bytes": peak_bytes()}
    expected, logits = outputs(model, q, test.images)
    agreement = float((expected.argmax(1) == logits.argmax(1)).mean())
    correct = [float((y.argmax(1) == test.labels).mean()) for y in (expected, logits)]
    return found | {
        "test_images": len(test.images),
        "held_out_images": len(others),
        "agreement": 100 * agreement,
        "float_top1": 100 * correct[0],
        "top1": 100 * correct[1],
        "logits_db": error_db(expected, logits),
        "held_out_db": error_db(*outputs(model, q, others)),
    }


def outputs(
    model: pretrained.Pretrained, q: qjax.Quantized, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits in float and quantized."""
    float_fn = jax.jit(model.apply_fn)
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    pairs = []
    for x in map(model.preprocess, parts):
        pairs.append((np.asarray(float_fn(model.params, x)), np.asarray(q.apply_fn(q.params, x))))
    expected, found = zip(*pairs, strict=True)
    return np.concatenate(expected), np.concatenate(found)


def row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A recipe's line of the table."""
    numbers = [f"{found[key]:.1f}" for key in ("top1", "agreement", "logits_db", "held_out_db")]
    return (name, *numbers, f"{found['seconds']:.0f}", f"{found['bytes'] / 1e9:.1f}")


def document(model: str, size: int, known: Mapping[str, Any]) -> str:
    """The page."""
    rows = [row(name, found) for name, found in known.items()]
    first = next(iter(known.values()))
    return TEXT.format(
        model=model,
        size=size,
        tested=first["test_images"],
        held_out=first["held_out_images"],
        top1=first["float_top1"],
        table=markdown_table(HEADER, rows, ALIGN),
    )
