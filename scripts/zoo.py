"""Many families of networks, quantized: what is found, how well it does, what it takes."""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import zoo_networks
from markdown_tables import markdown_table
from measure import cpu_seconds, in_fresh_process, peak_bytes
from onnx_sessions import quantize_static, session

import qjax
from pretrained import datasets
from qjax.atomic import write
from qjax.kept import Kept
from qjax.table import table

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE = DOCS / "results-zoo.jsonl", DOCS / "models.md"
IMAGES = 128  # to calibrate on, and as many to measure on
RECIPES: dict[str, qjax.Recipe] = {
    "W8A8": qjax.recipe(8),
    "W4A8": qjax.recipe(8, weight_bits=4),
    "W4A4": qjax.recipe(4),
}
EQUAL = 1e-5  # share of the largest output by which two results may differ and count as equal
OWN = "ONNX Runtime's own W8A8"
HEADER = ("network", "framework", "layers", "in float", *RECIPES, OWN)
HEADER += ("integers", "CPU s", "GB")
ALIGN = "<<" + ">" * (len(HEADER) - 2)

TEXT = """\
# Networks

{count} networks in {frameworks} frameworks, small and with random weights, from
`scripts/zoo_networks.py`, quantized by `qjax.recipe(8)` (W8A8), `qjax.recipe(8, weight_bits=4)`
(W4A8) and `qjax.recipe(4)` (W4A4) on {images} images and measured on {images} others: training
images of CIFAR-10, whole or as sequences of rows, and mixtures of tones for the network of sounds.
The columns of widths hold the error of the output, |f(x) - f̂(x)|² / |f(x)|², in dB; less is better.

* *in float*: products that stay in float, of two activations.
* *{own}*: `quantize_static` of the exported float model, MinMax, on the same images.
* *integers*: examples whose output by `qjax.integer` at W8A8 is that of fake quantization, to
  {equal} of the largest output.
* *CPU s*: CPU time of the first `qjax.quantize` at W8A8 in a fresh process, compilation included.
* *GB*: the most memory that it held.

{table}

{notes}
`python scripts/evaluate.py zoo`
"""


def inputs(example: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Examples to calibrate on and others to measure on."""
    if tuple(example) == zoo_networks.SOUND:
        rng = np.random.default_rng(0)
        times = np.arange(example[0])[None, None]
        pitches, phases = rng.uniform(0.01, 1, (2 * IMAGES, 5, 1)), rng.uniform(0, 6, (5, 1))
        tones = np.sin(pitches * times + phases) * rng.exponential(0.3, (2 * IMAGES, 5, 1))
        drawn = tones.sum(1)[..., None].astype(np.float32)
    else:
        images = datasets.load("cifar10", "train").images
        drawn = datasets.calibration_draw(images, 2 * IMAGES, 0).astype(np.float32) / 127.5 - 1
    drawn = drawn.reshape(len(drawn), *example)
    return drawn[:IMAGES], drawn[IMAGES:]


def measure(name: str) -> dict[str, Any]:
    """Quantizes a network at all widths: what came of it, as JSON values."""
    network = zoo_networks.NETWORKS[name]
    apply_fn, params = network.make()
    calibration, others = inputs(network.example)
    expected = np.asarray(jax.jit(apply_fn)(params, others))
    found: dict[str, Any] = {}
    for width, recipe in RECIPES.items():
        before = cpu_seconds()
        q = qjax.quantize(apply_fn, params, calibration, recipe)
        jax.block_until_ready(q.params)
        if "seconds" not in found:
            found["seconds"] = cpu_seconds() - before
            found["bytes"] = peak_bytes()
            found |= {"layers": len(q.report), "in_float": len(q.report.skipped)}
            found["integers"] = _share_of_equal(q, others)
        found[width] = error_db(expected, q.apply_fn(q.params, others))
    try:
        floats = qjax.to_onnx(apply_fn, params, calibration[:1])
    except ValueError as error:
        return found | {"not_exported": str(error)}
    try:
        run, _ = session(0, quantize_static(floats, calibration))
    except Exception as error:  # of ONNX Runtime, which has its own each
        return found | {"not_quantized": str(error).partition("\n")[0]}
    return found | {OWN: error_db(expected, run(others))}


def _share_of_equal(q: qjax.Quantized, x: np.ndarray) -> float:
    """Examples whose outputs by integers are those by fake quantization, in percent."""
    one, other = (np.asarray(run(q.params, x)) for run in (q.apply_fn, qjax.integer(q)))
    differences = np.abs(one - other).reshape(len(x), -1).max(1)
    return 100.0 * float((differences <= EQUAL * np.abs(one).max()).mean())


def error_db(expected: np.ndarray, found: Any) -> float:
    """Energy of the difference over that of what is expected, in dB."""
    difference = np.float64(expected) - np.float64(found)
    return 10 * float(np.log10((difference**2).sum() / (np.float64(expected) ** 2).sum()))


# ---- The page


def run(arguments: argparse.Namespace) -> None:
    """Measures the networks that are missing, each in a process of its own; writes the page."""
    results = arguments.results or RESULTS
    if arguments.restart:
        results.unlink(missing_ok=True)
    kept, known = Kept(results, {"images": IMAGES}), {}
    for name in zoo_networks.NETWORKS:
        print(name, flush=True)
        known[name] = kept.of(name, partial(in_fresh_process, measure, name))
    rows = [row(name, found) for name, found in known.items()]
    print(table(HEADER, rows, ALIGN))
    write(results.with_name(PAGE.name), document(known))


def measured(results: Path) -> dict[str, Any]:
    """What is kept of the networks."""
    _, *lines = map(json.loads, results.read_text().splitlines())
    return dict(lines)


def row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A network's line of the table."""
    network = zoo_networks.NETWORKS[name]
    errors = [f"{found[width]:.1f}" for width in RECIPES]
    own = f"{found[OWN]:.1f}" if OWN in found else "-"
    measured = (
        f"{found['integers']:.0f} %",
        f"{found['seconds']:.0f}",
        f"{found['bytes'] / 1e9:.1f}",
    )
    counts = (str(found["layers"]), str(found["in_float"]))
    return (network.family, network.framework, *counts, *errors, own, *measured)


def document(known: Mapping[str, Any]) -> str:
    """The page."""
    rows = [row(name, found) for name, found in known.items()]
    failures = {
        "not_exported": "Not exported",
        "not_quantized": "Not quantized, or not loaded then, by ONNX Runtime itself",
    }
    families: dict[str, list[str]] = {}
    for key, said in failures.items():
        for name, found in known.items():
            if key in found:
                reason = found[key].rpartition(" : ")[2]
                families.setdefault(f"{said} ({reason})", []).append(
                    zoo_networks.NETWORKS[name].family
                )
    notes = [f"{failure}: {', '.join(names)}.\n" for failure, names in families.items()]
    return TEXT.format(
        count=len(rows),
        frameworks=len({line[1] for line in rows}),
        images=IMAGES,
        own=OWN,
        equal=EQUAL,
        table=markdown_table(HEADER, rows, ALIGN),
        notes="\n".join(notes),
    )
