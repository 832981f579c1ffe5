"""`qjax study`: one question, answered by quantizing a model in several ways."""

import argparse
import textwrap
from functools import partial

from qjax.atomic import write
from qjax.cli import checkpoint, command, training
from qjax.cli.arguments import width_in_bits
from qjax.cli.loading import Loaded
from qjax.page.study import render_study
from qjax.progress import Progress
from qjax.recipe import Recipe
from qjax.study.accuracy import top1
from qjax.study.questions import QUESTIONS, study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what only this command takes."""
    add = parser.add_argument_group("what to study").add_argument
    texts = {name: question.text for name, question in QUESTIONS.items()}
    texts |= {training.NAME: training.QUESTION}
    questions = "; ".join(f"{name}: {text}" for name, text in texts.items())
    add("name", choices=texts, metavar="NAME", help=questions)
    add(
        "--widths",
        type=width_in_bits,
        nargs="+",
        metavar="N",
        help="widths in bits (2 to 16 for weight-bits and activation-bits, 8 6 4 for "
        "fixed-point, 8 4 3 2 1 for training, else 8 4)",
    )
    add("--report", metavar="FILE", help="write the study as a web page: study.html")
    checkpoint.add_argument(add)
    training.add_arguments(parser)


def answer(
    arguments: argparse.Namespace,
    loaded: Loaded,
    recipe: Recipe,
    progress: Progress,
) -> str:
    """Makes a study of a model; the arguments are those of `explain.answer`.

    Returns:
      The table to print.
    """
    with checkpoint.removed_at_end(arguments):
        return ANSWERS.get(arguments.name, _ask)(arguments, loaded, recipe, progress)


def _ask(
    arguments: argparse.Namespace,
    loaded: Loaded,
    recipe: Recipe,
    progress: Progress,
) -> str:
    """Answers one of `QUESTIONS`."""
    training.refuse_arguments(arguments)
    model, calibration, test = loaded
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
        kept=checkpoint.kept(arguments, loaded, recipe, study=arguments.name),
    )
    note = (
        f"top-1 in percent of {len(test.images):,} test images of {test.name}; agreement with the "
        "float network's predictions (percent) and SQNR of the logits on "
        f"{len(calibration):,} calibration images"
    )
    if arguments.report is not None:
        write(arguments.report, render_study(result, f"{model.name}: {note}"))
    return f"{result}\n\n{textwrap.fill(note, 80)}"


ANSWERS = {training.NAME: training.answer}

COMMAND = command.question(
    "study", "answer a question by quantizing in several ways", add_arguments, answer
)
