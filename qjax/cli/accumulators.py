"""`qjax accumulators`: how wide the accumulators of a model must be."""

import argparse
from functools import partial

from qjax.cli import command
from qjax.cli.loading import Loaded
from qjax.integer.accumulator import CHECKS, MAX_BITS, MIN_BITS, OVERFLOWS
from qjax.placing import BATCH_SIZE
from qjax.progress import Progress
from qjax.quantize import quantize
from qjax.recipe import Recipe
from qjax.study.accumulators import WIDTHS, study_accumulators
from qjax.study.accuracy import top1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what only this command takes."""
    add = parser.add_argument_group("what to study").add_argument
    add(
        "--widths",
        type=int,
        nargs="+",
        default=WIDTHS,
        metavar="N",
        help="widths of accumulators in bits, 2 to 32 (10 to 32)",
    )
    add(
        "--overflow",
        choices=tuple(OVERFLOWS),
        default="saturate",
        help="result of a sum that does not fit (%(default)s)",
    )
    add(
        "--check",
        choices=tuple(CHECKS),
        default="sum",
        help="check for overflow after the whole sum or after every term (%(default)s)",
    )


def answer(
    arguments: argparse.Namespace,
    loaded: Loaded,
    recipe: Recipe,
    progress: Progress,
) -> str:
    """Quantizes a model and studies its accumulators; the arguments are those of `explain.answer`.

    Returns:
      The tables to print.

    Raises:
      ValueError: an accumulator has no such width, or none would hold integers.
    """
    _check(arguments, recipe)
    model, calibration, test = loaded
    q = quantize(model.apply_fn, model.params, calibration, recipe, progress=progress)
    measure = partial(top1, images=test.images, labels=test.labels, preprocess=model.preprocess)
    size = min(BATCH_SIZE, len(calibration))
    starts = range(0, len(calibration) - size + 1, size)
    study = study_accumulators(
        q,
        [calibration[start : start + size] for start in starts],
        lambda function: measure(function, q.params),
        overflow=arguments.overflow,
        check=arguments.check,
        widths=sorted({*arguments.widths, 32}),
        progress=progress,
    )
    return (
        f"{study}\n\nranges on {len(starts) * size:,} calibration images; top-1 in percent of "
        f"{len(test.images):,} test images of {test.name},\nall accumulators at that width: "
        f"{arguments.overflow}, checked after every {arguments.check}"
    )


def _check(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Refuses widths that no accumulator has, and recipes without integer accumulators."""
    if not all(MIN_BITS <= bits <= MAX_BITS for bits in arguments.widths):
        raise ValueError(
            f"`--widths` must be from {MIN_BITS} to {MAX_BITS} bits; got {list(arguments.widths)}."
        )
    if recipe.weights is None or recipe.inputs is None:
        raise ValueError("integer accumulators need quantized weights and inputs; got float.")
    if recipe.inputs.is_dynamic:
        raise ValueError(
            "how wide accumulators must be depends on the ranges of the inputs; use "
            "`--activation-ranges` static."
        )


COMMAND = command.question(
    "accumulators", "measure how wide the accumulators must be", add_arguments, answer
)
