"""The options that commands share: what to quantize, and how.

An option of a recipe that is not given is None, so that what was given can be told.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from qjax.cli.loading import CALIBRATION_SIZE, Loaded, add_dataset, at_least_one, load
from qjax.cli.wording import RECIPE, flag
from qjax.formats.affine import AFFINE
from qjax.formats.spec import (
    FORMATS,
    MAX_BITS,
    MIN_BITS,
    ActivationGranularity,
    ActivationRanges,
)
from qjax.objectives.table import OBJECTIVES
from qjax.progress import Progress
from qjax.recipe import LayerRecipe, Matmuls, OutputPosition, Recipe, Sums, Tables, recipe
from qjax.rounding.table import ROUNDINGS
from qjax.targets import TARGETS

MODEL = "resnet20-digits"
MODELS = (
    "pretrained model, safetensors file with weights of a ResNet, a MobileNetV2 or an "
    "EfficientNet-Lite, or package.module:function that returns (apply_fn, params) or (apply_fn, "
    "params, preprocess)"
)
BITS = 8
FLOAT = "float"

_PARTS = {"weight": "weights", "input": "inputs", "output": "outputs"}  # option: field of a recipe


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declares what is quantized; `load_model` reads it."""
    add = parser.add_argument_group("what to quantize").add_argument
    add_network(add)
    add(
        "--test-dataset",
        metavar="NAME",
        help="evaluate on the test images of another dataset with the same classes, e.g. "
        "emnist/digits (--dataset)",
    )
    add(
        "--calibration-size",
        type=at_least_one,
        metavar="N",
        help=f"training images to calibrate on ({CALIBRATION_SIZE}, or all if there are fewer)",
    )
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="random seed for choosing calibration images (%(default)s)",
    )


def add_network(add: Callable[..., Any]) -> None:
    """Declares a model and its images, by a parser's or a group's `add_argument`."""
    add("--model", default=MODEL, metavar="MODEL", help=f"{MODELS} (%(default)s)")
    add_dataset(add)


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
    add = parser.add_argument_group("how to quantize (widths are 1 to 16 bits)").add_argument
    switch: dict[str, Any] = {"action": "store_true", "default": None}
    off: dict[str, Any] = {"action": "store_false", "default": None}
    add(
        "--recipe",
        metavar="FILE",
        help="read the recipe from the JSON of an earlier run; excludes the other options here",
    )
    add("--bits", type=int, metavar="N", help=f"width of weights, inputs and outputs ({BITS})")
    for part in _PARTS:
        add(
            f"--{part}-bits",
            type=_width,
            metavar="N|float",
            help=f"width of the {part}s, or float to leave them (--bits)",
        )
    add(
        "--fixed-point",
        **switch,
        help="make every scale a power of two, for a network that runs with shifts alone",
    )
    add(
        "--target",
        choices=tuple(TARGETS),
        metavar="NAME",
        help=f"use the formats that a runtime supports: {', '.join(TARGETS)}",
    )
    add("--first-last-bits", type=int, metavar="N", help="width in the first and the last layer")
    add(
        "--override",
        type=_override,
        action="append",
        dest="overrides",
        metavar="PATTERN=N|float",
        help="width in the layers whose names match a glob, such as '*conv1=4'; what is left in "
        "float stays so; may be repeated, and the last match counts",
    )
    choose = partial(_add_choice, add)
    choose(
        "--range-method",
        OBJECTIVES,
        LayerRecipe().objective.name,
        "objective of the clipping ranges",
    )
    choose(
        "--activation-granularity",
        ActivationGranularity,
        "per_tensor",
        "granularity of the scales of inputs and outputs",
    )
    choose(
        "--activation-ranges",
        ActivationRanges,
        "static",
        "ranges of activations, fixed after calibration or taken from the extremes at run time; "
        "dynamic leaves outputs in float unless --output-bits is given",
    )
    choose(
        "--output-position",
        OutputPosition,
        Recipe.output_position,
        "position at which outputs are rounded",
    )
    choose("--weight-format", FORMATS, AFFINE.name, "number format of the weights")
    choose("--sums", Sums, Recipe.sums, "residual sums, concatenations and pools")
    choose(
        "--matmuls",
        Matmuls,
        Recipe.matmuls,
        "products of two activations, as attention scores are",
    )
    choose(
        "--tables",
        Tables,
        Recipe.tables,
        "params that the input picks from: embeddings, kernels of experts",
    )
    choose("--rounding", ROUNDINGS, LayerRecipe().round_with.name, "rounding of the weights")
    add(
        "--sweeps",
        type=int,
        metavar="N",
        help=f"number of coordinate sweeps after rounding ({Recipe.sweeps})",
    )
    add(
        "--no-bias-correction",
        dest="bias_correction",
        **off,
        help="do not correct the mean error of each channel",
    )
    add(
        "--equalize",
        **switch,
        help="equalize the channels between consecutive layers before quantizing",
    )
    add(
        "--logits",
        **switch,
        help="choose the range of the network's output by the error of the classes' probabilities",
    )
    add(
        "--reconstructions",
        type=int,
        metavar="N",
        help="number of least-squares fits of every kernel to its quantized input "
        f"({Recipe.reconstructions})",
    )
    add(
        "--end-search",
        type=int,
        metavar="N",
        help="search the ranges of N layers again by the probabilities of the classes; the first, "
        "the last, then those that matter most (0)",
    )
    add("--no-sequential", dest="sequential", **off, help="fit every layer on float inputs")


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """Makes the recipe that the options of `add_recipe` ask for.

    Raises:
      ValueError: a width or a file is not one.
    """
    given = given_for_recipe(arguments)
    if arguments.recipe is not None:
        if given:
            others = ", ".join(f"`{flag(name)}`" for name in given)
            raise ValueError(f"`--recipe` has all that {others} would say; give one or the other.")
        return _recipe_of_file(Path(arguments.recipe))
    _check_granularity(arguments)
    for part, field in _PARTS.items():
        if given.get(f"{part}_bits") == FLOAT:
            del given[f"{part}_bits"]
            given[field] = None
    return recipe(**given)


def given_for_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_recipe` that were given, but for `--recipe`."""
    found = {name: getattr(arguments, name, None) for name in RECIPE}
    return {name: value for name, value in found.items() if value is not None}


def _check_granularity(arguments: argparse.Namespace) -> None:
    """Refuses scales of activations that are finer than other options allow."""
    ranges, found = arguments.activation_ranges or "static", arguments.activation_granularity
    is_fixed_point = bool(arguments.fixed_point)
    allowed = _GRANULARITIES[ranges]
    if is_fixed_point:
        allowed = tuple(name for name in allowed if name != "per_channel")
    if found is not None and found not in allowed:
        given = f"{'`--fixed-point` and ' * is_fixed_point}`--activation-ranges` {ranges}"
        raise ValueError(
            f"`--activation-granularity` must be {' or '.join(allowed)} with {given}; got {found}."
        )


_GRANULARITIES: Mapping[str, tuple[str, ...]] = {
    "static": ("per_tensor", "per_channel"),
    "dynamic": ("per_tensor", "per_example"),
}


def _add_choice(
    add: Callable[..., Any], option: str, choices: Any, default: str, text: str
) -> None:
    names = tuple(choices) if isinstance(choices, Mapping) else get_args(choices)
    help_text = f"{text}: {', '.join(names)} ({default})"
    add(option, choices=names, metavar="NAME", help=help_text)


def _width(text: str) -> int | str:
    """Reads a number of bits, or `float`."""
    if text in (FLOAT, "none"):
        return FLOAT
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
    if _width(width) == FLOAT:
        return pattern, dict.fromkeys(_PARTS.values())
    return pattern, {"bits": width_in_bits(width)}


def width_in_bits(text: str) -> int:
    """Reads a width that codes can have."""
    if not text.isdecimal() or not MIN_BITS <= int(text) <= MAX_BITS:
        raise argparse.ArgumentTypeError(
            f"expected a width from {MIN_BITS} to {MAX_BITS} bits; got {text!r}"
        )
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer from 0 on; got {text!r}")
    return int(text)


def _recipe_of_file(path: Path) -> Recipe:
    """Reads a recipe: the `recipe` of a JSON object, or the object itself."""
    try:
        found = json.loads(path.read_text())
        return Recipe.from_json(found.get("recipe", found))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".") if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"`--recipe` must name a file with a recipe (the JSON line of --json, or the manifest "
            f"of --out); {path} holds none: {reason}."
        ) from error
