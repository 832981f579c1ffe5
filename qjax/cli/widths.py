"""The widths that `qjax quantize` finds: one for all layers, or one for every layer."""

import argparse
import math
from functools import partial
from typing import Any

from qjax import artifact
from qjax.cli import checkpoint
from qjax.cli.arguments import FLOAT
from qjax.cli.loading import Loaded
from qjax.cli.wording import flag
from qjax.progress import Progress
from qjax.quantize import Quantized, quantize
from qjax.recipe import Recipe
from qjax.study.accuracy import top1
from qjax.study.allocate import FLOAT_BITS, Allocation, BudgetError, allocate, meet_target
from qjax.study.questions import AGREEMENT, Measure, search_bits, summary
from qjax.study.sensitivity import WIDTHS, Sensitivity, measure_sensitivities

SENSITIVITY_IMAGES = 256  # of the calibration images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what widths can be found by; at most one of them may be given."""
    group = parser.add_argument_group("search for widths (instead of --bits)")
    add = group.add_mutually_exclusive_group().add_argument
    add(
        "--search-bits",
        type=float,
        nargs="?",
        const=AGREEMENT,
        metavar="PERCENT",
        help="find one width for all layers: start at 2 bits and add one until this percentage of "
        "the calibration images is classified as in float (%(const)s)",
    )
    add(
        "--average-bits",
        type=float,
        metavar="X",
        help="average width of the weights, and of the activations",
    )
    add(
        "--max-bytes", type=int, metavar="N", help="size of all parameters; activations keep --bits"
    )
    add(
        "--target-drop",
        type=float,
        metavar="POINTS",
        help="fewest bits whose estimated loss of top-1 accuracy is at most this",
    )


def check(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Refuses a goal that no network can meet, and one with the widths that it finds."""
    _check_contradictions(arguments)
    share = arguments.search_bits
    if share is not None and not 0 < share <= 100:
        raise ValueError(f"`--search-bits` must be above 0 and at most 100 percent; got {share}.")
    average, size, drop = arguments.average_bits, arguments.max_bytes, arguments.target_drop
    if average is not None and not WIDTHS[0] <= average <= WIDTHS[-1]:
        raise ValueError(
            f"`--average-bits` must be from {WIDTHS[0]} to {WIDTHS[-1]}; got {average}."
        )
    if size is not None and (size < 1 or recipe.weights is None):
        got = "weights in float" if recipe.weights is None else size
        raise ValueError(f"`--max-bytes` must be positive, and weights quantized; got {got}.")
    if drop is not None and not drop >= 0:
        raise ValueError(f"`--target-drop` must be at least 0 points; got {drop}.")


def is_wanted(arguments: argparse.Namespace) -> bool:
    """Whether a goal was given."""
    return any(getattr(arguments, goal) is not None for goal in _GOALS)


_WIDTHS = ("bits", "weight_bits", "input_bits", "output_bits")

# By goal: the options of a recipe that give what it finds.
_GOALS = {
    "search_bits": _WIDTHS,
    "average_bits": _WIDTHS,
    "max_bytes": ("weight_bits",),
    "target_drop": _WIDTHS,
}


def _check_contradictions(arguments: argparse.Namespace) -> None:
    for goal, found in _GOALS.items():
        given = [name for name in found if getattr(arguments, name) not in (None, FLOAT)]
        if getattr(arguments, goal) is not None and given:
            others = ", ".join(f"`{flag(name)}`" for name in given)
            raise ValueError(f"`{flag(goal)}` finds what {others} would give; leave one out.")


def run(
    arguments: argparse.Namespace, loaded: Loaded, recipe: Recipe, progress: Progress
) -> tuple[Quantized, str]:
    """Finds widths and quantizes with them.

    Args:
      arguments: the goal.
      loaded: the model and its images.
      recipe: what else is to be done.
      progress: called with (what is being done, how much is done, how much there is).

    Returns:
      The quantized network, and the explanation to print.

    Raises:
      ValueError: the goal cannot be met.
    """
    if arguments.search_bits is not None:
        return _one_for_all(arguments.search_bits, loaded, recipe, progress)
    model, calibration, _ = loaded
    few = calibration[:SENSITIVITY_IMAGES]
    network = (model.apply_fn, model.params)
    found = _sensitivities(arguments, loaded, recipe, progress)
    if arguments.target_drop is not None:
        chosen, q, drop = meet_target(
            *network, calibration, recipe, found, arguments.target_drop, progress
        )
        return q, f"{chosen}\n\nestimated loss of accuracy, without labels: {drop:.2f} points"
    if arguments.max_bytes is None:
        chosen = allocate(found, recipe, average_bits=arguments.average_bits)
    else:
        chosen = _within_bytes(arguments.max_bytes, network, few, recipe, found)
    options: dict[str, Any] = {"progress": progress, "checkpoint": arguments.checkpoint}
    options["memory"] = arguments.memory
    return quantize(*network, calibration, chosen.recipe, **options), str(chosen)


def _sensitivities(
    arguments: argparse.Namespace, loaded: Loaded, recipe: Recipe, progress: Progress
) -> tuple[Sensitivity, ...]:
    """Those of all layers, kept for a run that goes on."""
    model, calibration, _ = loaded
    few = calibration[:SENSITIVITY_IMAGES]

    def measure() -> list[Any]:
        network = (model.apply_fn, model.params)
        found = measure_sensitivities(*network, few, recipe, progress=progress)
        return [[*item[:-1], [*item.errors.items()]] for item in found]

    found = checkpoint.kept(arguments, loaded, recipe).of("sensitivities", measure)
    return tuple(
        Sensitivity(layer, part, elements, dict(errors)) for layer, part, elements, errors in found
    )


def _one_for_all(
    agreement: float, loaded: Loaded, recipe: Recipe, progress: Progress
) -> tuple[Quantized, str]:
    """The least width that is good enough, and the table of the widths that were tried."""
    model, calibration, test = loaded
    top1_of = partial(top1, images=test.images, labels=test.labels, preprocess=model.preprocess)
    measure = Measure(model.apply_fn, model.params, calibration, top1_of)
    q, rows = search_bits(measure, recipe, agreement, progress)
    return q, summary(("bits",), rows, top1_of(model.apply_fn, model.params))


def _within_bytes(
    budget: int, network: tuple[Any, Any], images: Any, recipe: Recipe, found: Any
) -> Allocation:
    """Allocates what a budget for all parameters leaves to the codes of the kernels."""
    q = quantize(*network, images[:1], recipe.naive())
    weights: list[Sensitivity] = [item for item in found if item.part == "weights"]
    bits = {record.name: record.weight_bits or FLOAT_BITS for record in q.report}
    codes = sum(math.ceil(bits[item.layer] * item.elements / 8) for item in weights)
    others = artifact.stored_bytes(q) - codes
    try:
        return allocate(found, recipe, max_kernel_bytes=budget - others)
    except BudgetError as error:
        raise ValueError(
            f"`--max-bytes` must be at least {others + error.least:,}, {others:,} of them for "
            f"scales, biases and what stays in float; got {budget:,}."
        ) from error
