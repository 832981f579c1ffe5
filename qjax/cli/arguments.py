"""The options that commands share: what to quantize, how, and where a page is written."""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from qjax.cli.loading import CALIBRATION_SIZE, Loaded, load
from qjax.formats.affine import AFFINE
from qjax.formats.spec import FORMATS, ActivationGranularity, ActivationRanges
from qjax.objectives.table import OBJECTIVES
from qjax.progress import Progress
from qjax.recipe import LayerRecipe, OutputPosition, Recipe, Sums, recipe
from qjax.rounding.table import ROUNDINGS
from qjax.targets import TARGETS

MODEL = "resnet20-digits"

_PARTS = {"weight": "weights", "input": "inputs", "output": "outputs"}  # option: field of a recipe


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declares what is quantized; `load_model` reads it."""
    add = parser.add_argument_group("what to quantize").add_argument
    add("--model", default=MODEL, metavar="NAME|PATH", help="pretrained model (%(default)s)")
    add("--dataset", metavar="NAME", help="digits or a TFDS name (the model's own)")
    add(
        "--test-dataset",
        metavar="NAME",
        help="evaluate on the test images of another dataset with the same classes, e.g. "
        "emnist/digits (--dataset)",
    )
    add(
        "--calibration-size",
        type=_at_least_one,
        metavar="N",
        help=f"training images to calibrate on ({CALIBRATION_SIZE}, or all if there are fewer)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of their draw (%(default)s)")


def load_model(arguments: argparse.Namespace, progress: Progress) -> Loaded:
    """Loads what the options of `add_model` name."""
    return load(
        arguments.model,
        arguments.dataset,
        arguments.test_dataset,
        arguments.calibration_size,
        arguments.seed,
        progress,
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declares how it is quantized; `read_recipe` reads it."""
    add = parser.add_argument_group("how (widths are 1 to 16 bits)").add_argument
    add(
        "--recipe", metavar="FILE", help="from the JSON of an earlier run; all else here is ignored"
    )
    add("--bits", type=int, default=8, metavar="N", help="weights, inputs, outputs (%(default)s)")
    for part in _PARTS:
        add(
            f"--{part}-bits",
            type=_width,
            metavar="N|float",
            help=f"width of the {part}s, or float to leave them (--bits)",
        )
    add(
        "--fixed-point",
        action="store_true",
        help="make every scale a power of two, for a network that runs with shifts alone",
    )
    add(
        "--target",
        choices=tuple(TARGETS),
        metavar="NAME",
        help=f"in the formats that a runtime takes: {', '.join(TARGETS)}",
    )
    add("--first-last-bits", type=int, metavar="N", help="width in the first and last layer")
    add(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="PATTERN=N|float",
        help="width in the layers whose name matches a glob, e.g. '*conv1=4', of what is not in "
        "float; repeatable, later ones win",
    )
    choose = partial(_add_choice, add)
    choose(
        "--range-method", OBJECTIVES, LayerRecipe().objective.name, "how clipping ranges are chosen"
    )
    choose(
        "--activation-granularity",
        ActivationGranularity,
        "per_tensor",
        "of the scales of inputs and outputs",
    )
    choose(
        "--activation-ranges",
        ActivationRanges,
        "static",
        "found on training images or, as the extremes, at run time, which leaves outputs in float "
        "unless --output-bits is given",
    )
    choose("--output-position", OutputPosition, Recipe.output_position, "where outputs are rounded")
    choose("--weight-format", FORMATS, AFFINE.name, "what the codes of the weights stand for")
    choose(
        "--sums", Sums, Recipe.sums, "residual sums, concatenations, pools, as integer hardware has"
    )
    choose("--rounding", ROUNDINGS, LayerRecipe().round_with.name, "of the weights")
    add(
        "--sweeps",
        type=int,
        default=Recipe.sweeps,
        metavar="N",
        help="coordinate sweeps after rounding (%(default)s)",
    )
    add("--no-bias-correction", action="store_true", help="keep the mean error of each channel")
    add("--equalize", action="store_true", help="even out the channels between two layers first")
    add(
        "--logits",
        action="store_true",
        help="choose the range of the network's output by the error of the classes' probabilities",
    )
    add(
        "--reconstructions",
        type=int,
        default=Recipe.reconstructions,
        metavar="N",
        help="least-squares fits of every kernel to its quantized input (%(default)s)",
    )
    add("--no-sequential", action="store_true", help="fit every layer on float inputs")


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """Makes the recipe that the options of `add_recipe` ask for.

    Raises:
      ValueError: a width or a file is not one.
    """
    if arguments.recipe is not None:
        return _recipe_of_file(Path(arguments.recipe))
    _check_granularity(arguments)
    fields: dict[str, Any] = {}
    for part, field in _PARTS.items():
        width = getattr(arguments, f"{part}_bits")
        fields |= {field: None} if width == "float" else {f"{part}_bits": width}
    return recipe(
        arguments.bits,
        first_last_bits=arguments.first_last_bits,
        activation_granularity=arguments.activation_granularity,
        fixed_point=arguments.fixed_point,
        activation_ranges=arguments.activation_ranges,
        weight_format=arguments.weight_format,
        target=arguments.target,
        range_method=arguments.range_method,
        output_position=arguments.output_position,
        rounding=arguments.rounding,
        reconstructions=arguments.reconstructions,
        sweeps=arguments.sweeps,
        equalize=arguments.equalize,
        logits=arguments.logits,
        sums=arguments.sums,
        sequential=not arguments.no_sequential,
        bias_correction=not arguments.no_bias_correction,
        overrides=arguments.override,
        **fields,
    )


def _check_granularity(arguments: argparse.Namespace) -> None:
    """Refuses scales of activations that are finer than other options allow."""
    ranges, found = arguments.activation_ranges, arguments.activation_granularity
    allowed = _GRANULARITIES[ranges]
    if arguments.fixed_point:
        allowed = tuple(name for name in allowed if name != "per_channel")
    if found not in allowed:
        given = f"{'`--fixed-point` and ' * arguments.fixed_point}`--activation-ranges` {ranges}"
        raise ValueError(
            f"`--activation-granularity` must be {' or '.join(allowed)} with {given}; got {found}."
        )


_GRANULARITIES: Mapping[str, tuple[str, ...]] = {
    "static": ("per_tensor", "per_channel"),
    "dynamic": ("per_tensor", "per_example"),
}


def check_report(arguments: argparse.Namespace) -> None:
    """Refuses a `--report` that could not be written, before any work is done.

    Raises:
      ValueError: it is a folder, or its folder does not exist.
    """
    path = arguments.report
    if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"`--report` must name a file in an existing folder; got {path!r}.")


def _add_choice(add: Callable[..., Any], flag: str, choices: Any, default: str, text: str) -> None:
    names = tuple(choices) if isinstance(choices, Mapping) else get_args(choices)
    help_text = f"{text}: {', '.join(names)} (%(default)s)"
    add(flag, choices=names, default=default, metavar="NAME", help=help_text)


def _width(text: str) -> int | str:
    """Reads a number of bits, or `float`."""
    if text in ("float", "none"):
        return "float"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of bits or float; got {text!r}"
        ) from None


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """Reads PATTERN=WIDTH as an entry of `Recipe.overrides`."""
    pattern, equals, width = text.rpartition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"expected PATTERN=N or PATTERN=float; got {text!r}")
    bits = _width(width)
    return pattern, dict.fromkeys(_PARTS.values()) if bits == "float" else {"bits": bits}


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 image; got {text!r}")
    return int(text)


def _recipe_of_file(path: Path) -> Recipe:
    """Reads a recipe: the `recipe` of a JSON object, or the object itself."""
    try:
        found = json.loads(path.read_text())
        return Recipe.from_json(found.get("recipe", found))
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--recipe` must name a file with a recipe (the JSON line of --json, or the manifest "
            f"of --out); {path} holds none: {error}."
        ) from error
