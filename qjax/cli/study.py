"""`qjax study`: one question, answered by quantizing a model in several ways."""

import argparse
import textwrap
from functools import partial
from typing import Any

from qjax.formats.spec import Recipe
from qjax.page.document import write
from qjax.page.study import render_study
from qjax.progress import Progress
from qjax.quantize import Quantized
from qjax.study.accuracy import top1
from qjax.study.questions import QUESTIONS, Measure, search_bits, study, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what only this command takes."""
    add = parser.add_argument_group("what to study").add_argument
    questions = "; ".join(f"{name}: {question.text}" for name, question in QUESTIONS.items())
    add("name", choices=QUESTIONS, metavar="NAME", help=questions)
    add(
        "--widths",
        type=int,
        nargs="+",
        metavar="N",
        help="widths in bits (2 to 16 for weight-bits and activation-bits, else 8 4)",
    )
    add("--report", metavar="FILE", help="write a page to look at: study.html")


def run(
    arguments: argparse.Namespace,
    model: Any,
    calibration: Any,
    test: Any,
    recipe: Recipe,
    progress: Progress,
) -> str:
    """Makes a study of a model; the arguments are those of `cli.explain.run`.

    Returns:
      The table to print.
    """
    measure = partial(top1, images=test.images, labels=test.labels, preprocess=model.preprocess)
    result = study(
        arguments.name,
        model.apply_fn,
        model.params,
        calibration,
        measure,
        recipe,
        widths=arguments.widths,
        progress=progress,
    )
    note = (
        f"top-1 in percent of {len(test.images):,} test images of {test.name}; agreement with the "
        "float network's predictions (percent) and SQNR of the logits on "
        f"{len(calibration):,} calibration images"
    )
    if arguments.report is not None:
        write(arguments.report, render_study(result, f"{model.name}: {note}"))
    return f"{result}\n\n{textwrap.fill(note, 80)}"


def search(
    arguments: argparse.Namespace,
    model: Any,
    calibration: Any,
    test: Any,
    recipe: Recipe,
    progress: Progress,
) -> tuple[Quantized, str]:
    """Finds the least width that is good enough; the arguments are those of `cli.explain.run`.

    Returns:
      The quantized network, and the table of the widths that were tried.
    """
    top1_of = partial(top1, images=test.images, labels=test.labels, preprocess=model.preprocess)
    measure = Measure(model.apply_fn, model.params, calibration, top1_of)
    q, rows = search_bits(measure, recipe, arguments.search_bits, progress)
    float_top1 = top1_of(model.apply_fn, model.params)
    return q, f"{summary(('bits',), rows, float_top1)}\n"
