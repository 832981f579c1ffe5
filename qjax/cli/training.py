"""`qjax study training`: post-training quantization against quantization-aware training."""

import argparse
import textwrap
from typing import Any

from pretrained import comparison, datasets
from pretrained.finetuning import ENDS
from qjax.atomic import write
from qjax.cli.loading import Loaded
from qjax.page.study import render_table
from qjax.progress import Progress
from qjax.qat.methods import METHODS
from qjax.recipe import Recipe, recipe
from qjax.table import table

NAME = "training"
QUESTION = "When does it pay to train with quantized values?"
DEFAULTS: dict[str, Any] = {"seeds": (0, 1, 2), "epochs": 1.0, "methods": comparison.TRAINED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what only this study takes."""
    add = parser.add_argument_group("options of the study training").add_argument
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="random seeds of calibration draws and of training (0 1 2)",
    )
    add("--epochs", type=float, metavar="X", help="epochs of training (1)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"methods of training: {', '.join(METHODS)} ({' '.join(comparison.TRAINED)}); one bit "
        "is for binary_* and xnor, more for the others",
    )


def refuse_arguments(arguments: argparse.Namespace) -> None:
    """Refuses in other studies what only this one takes."""
    for option in DEFAULTS:
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"`--{option}` is of the study {NAME}; leave it out of {arguments.name}."
            )


def answer(
    arguments: argparse.Namespace, loaded: Loaded, chosen: Recipe, progress: Progress
) -> str:
    """Trains a model at several widths; the arguments are those of `explain.answer`.

    Returns:
      The table to print.
    """
    _check(arguments, chosen)
    seeds, epochs, methods = (_option(arguments, option) for option in DEFAULTS)
    ends = arguments.first_last_bits or ENDS
    wanted = list(comparison.cases(arguments.widths or comparison.WIDTHS, methods, seeds))
    if not wanted:
        raise ValueError(
            "`--methods` has none for the `--widths`: one bit is for binary_* and xnor."
        )
    model, _, test = loaded
    found = comparison.measure(
        model,
        wanted,
        epochs,
        ends,
        datasets.load(arguments.dataset or model.dataset, "train"),
        test,
        datasets.cache_dir() / "training",
        progress,
    )
    rows = comparison.rows(found, ends)
    note = (
        f"{model.name}: top-1 in percent of {len(test.images):,} test images of {test.name}, mean "
        f"± standard deviation over seeds {', '.join(map(str, seeds))}; widths of weights, inputs "
        f"and outputs, {ends} bits in the first and last layer; {epochs:g} epochs; seconds of "
        "quantization with its compilation, and of training"
    )
    if arguments.report is not None:
        page = render_table(NAME, QUESTION, note, comparison.HEADER, rows, comparison.ACCURACIES)
        write(arguments.report, page)
    text = table(comparison.HEADER, rows, "<<<>>>>>")
    return f"{QUESTION}\n\n{text}\n\n{textwrap.fill(note, 80)}"


def _option(arguments: argparse.Namespace, name: str) -> Any:
    given = getattr(arguments, name)
    return DEFAULTS[name] if given is None else given


def _check(arguments: argparse.Namespace, chosen: Recipe) -> None:
    if chosen != recipe(8, first_last_bits=arguments.first_last_bits):
        raise ValueError(
            f"the study {NAME} has recipes of its own; of the options of a recipe it takes only "
            "`--first-last-bits`. Leave out the others, and give widths as `--widths`."
        )
    if arguments.calibration_size is not None or arguments.seed:
        raise ValueError(
            f"the study {NAME} draws its own training images to calibrate on; leave out "
            "`--calibration-size`, and give `--seeds` for `--seed`."
        )
    if arguments.checkpoint is not None:
        raise ValueError(
            f"the study {NAME} keeps what is finished in the cache folder; leave out "
            "`--checkpoint`."
        )
    if not (arguments.epochs is None or arguments.epochs > 0):
        raise ValueError(f"`--epochs` must be positive; got {arguments.epochs}.")
