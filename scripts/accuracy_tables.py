"""The tables of accuracy in the documentation: what their rows and columns quantize, and how."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import qjax
from qjax.recipe import Matmuls, Recipe
from qjax.study.questions import ways_to_ranges

WIDTHS = (8, 6, 5, 4, 3, 2)
FORMATS = {"W6A6": (6, 6), "W4A8": (4, 8), "W3A8": (3, 8), "W2A8": (2, 8)}
FORMATS |= {"W4A4": (4, 4), "W3A3": (3, 3)}
FIXED_POINT_WIDTHS, RANGE_WIDTHS = (8, 6, 4), (8, 4)
ATTENTION_FORMATS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
CALIBRATION_SIZES = (8, 16, 32, 64, 128, 256, 1024)
UNIFORM = "uniform"
INPUTS: dict[str, Any] = {"outputs": None}
WEIGHTS: dict[str, Any] = {"inputs": None, "outputs": None}
COLUMNS: dict[str, dict[str, Any]] = {
    "inputs and outputs": {},
    "inputs": INPUTS,
    "inputs, first and last layer at 8 bits": INPUTS | {"first_last_bits": 8},
}
PER_CHANNEL: dict[str, Any] = {"activation_granularity": "per_channel"}
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
PUBLIC = "resnet20-cifar10.torch.safetensors"


class Way(NamedTuple):
    """A way to quantize and to evaluate.

    Attributes:
      recipe: how to quantize.
      has_images: whether there are images to calibrate on.
      arithmetic: of integers, see `qjax.integer`; None for fake quantization.
      ends: layers whose ranges are searched again, see `Recipe.end_search`.
      is_tuned: whether scales and biases are tuned then, see `qjax.tune`.
      images: to calibrate on; None for as many as the command line says.
    """

    recipe: Recipe
    has_images: bool = True
    arithmetic: str | None = None
    ends: int = 0
    is_tuned: bool = False
    images: int | None = None


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
      page: the page in docs that shows it, where it has the table's marks.
    """

    title: str
    rows: Sequence[str]
    recipes: Mapping[tuple[str, str], Recipe | Way]
    shown: Sequence[str] = ()
    in_readme: Sequence[str] = ()
    is_long: bool = False
    error: str = "error"
    page: str = "results.md"

    @property
    def columns(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(column for _, column in self.recipes))

    def way(self, row: str, column: str) -> Way:
        """What a cell measures."""
        found = self.recipes[row, column]
        return found if isinstance(found, Way) else Way(found)


def tables() -> dict[str, Table]:
    """The tables by name."""
    return {
        "tuning": tuning(),
        "attention": attention(),
        "calibration": calibration(),
        "codebooks": codebooks(),
        "fixed-point": fixed_point(),
        "ranges": ranges(),
        "ablation": ablation(),
        "widths": widths(),
        "mixed": mixed(),
    }


def widths() -> Table:
    """Every width, of more and more tensors."""
    parts: dict[str, dict[str, Any]] = {
        "weights": WEIGHTS,
        "weights, inputs": INPUTS,
        "weights, inputs, outputs": {},
    }
    recipes = {
        (part, f"{bits} bits"): qjax.recipe(bits, **fields)
        for part, fields in parts.items()
        for bits in WIDTHS
    }
    return Table("Top-1 by bit width", list(parts), recipes)


def mixed() -> Table:
    """Widths of weights and activations apart, and finer scales."""
    recipes = {
        (name, column): qjax.recipe(activation_bits, weight_bits=weight_bits, **fields)
        for name, (weight_bits, activation_bits) in FORMATS.items()
        for column, fields in COLUMNS.items()
    }
    for bits in (6, 4, 3):
        for column, fields in COLUMNS.items():
            row = f"W{bits}A{bits}, activations per channel"
            recipes[row, column] = qjax.recipe(bits, **fields, **PER_CHANNEL)
    for bits in (4, 3):
        row = f"W{bits}A{bits}, logits by their probabilities"
        recipes[row, "inputs and outputs"] = qjax.recipe(bits, logits=True)
    recipes["W4A4, both", "inputs and outputs"] = qjax.recipe(4, logits=True, **PER_CHANNEL)
    return Table(
        "Top-1 by widths of weights and activations",
        list(dict.fromkeys(row for row, _ in recipes)),
        recipes,
        shown=(PUBLIC,),
        in_readme=("W6A6", "W4A8", "W4A4", "W4A4, both", "W3A3"),
    )


def attention() -> Table:
    """Products of two activations in float and on codes."""
    columns = {f"products of two activations {where}": where for where in get_args(Matmuls)}
    recipes = {
        (row, column): qjax.recipe(bits, weight_bits=weight_bits, matmuls=where)
        for row, (weight_bits, bits) in ATTENTION_FORMATS.items()
        for column, where in columns.items()
    }
    title = "Products of two activations in float and quantized"
    return Table(title, list(ATTENTION_FORMATS), recipes, shown=("vit-mnist",))


def calibration() -> Table:
    """Few calibration images and many, by the default recipe and by less of it."""
    rows, ways = [], {}
    for bits in RANGE_WIDTHS:
        full = qjax.recipe(bits)
        recipes = {
            "default": full,
            "no least-squares fits": dataclasses.replace(full, reconstructions=0),
            "naive": full.naive(),
        }
        for name, recipe in recipes.items():
            rows.append(f"{bits} bits, {name}")
            ways |= {(rows[-1], f"{n:,}"): Way(recipe, images=n) for n in CALIBRATION_SIZES}
    return Table("Calibration images", rows, ways, page="calibration-data.md")


def ablation() -> Table:
    """Each ingredient of the method added to those above it."""
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
    recipes = {}
    for column, full in formats.items():
        recipe = dataclasses.replace(full.naive(), refinements=0)
        for row, changes in steps.items():
            recipe = dataclasses.replace(recipe, **changes)
            recipes[row, column] = recipe
    title = "Ablation: each ingredient added to those above it (the default: all but the last two)"
    return Table(title, list(steps), recipes)


def codebooks() -> Table:
    """Formats of weights at equal widths."""
    kernels: dict[str, dict[str, Any]] = {
        UNIFORM: {},
        "uniform, asymmetric": {"symmetric": False},
        "kmeans": {"format": "kmeans"},
        "kmeans per tensor": {"format": "kmeans", "granularity": "per_tensor"},
        **{name: {"format": name} for name in ("power_of_two", "apot", "quantile", "nf4")},
    }
    recipes = {
        (row, f"{bits} bits"): qjax.recipe(8, weights=qjax.QuantSpec(bits, **fields), **WEIGHTS)
        for bits in (3, 4, 2)
        for row, fields in kernels.items()
        if row != "nf4" or bits == 4
    }
    return Table("Formats of weights", list(kernels), recipes, is_long=True)


def fixed_point() -> Table:
    """Scales that are powers of two against free ones."""
    rows = {
        "free scales": (False, None),
        "powers of two": (True, None),
        "powers of two, integers and shifts": (True, "shift"),
    }
    ways = {
        (row, f"{bits} bits"): Way(qjax.recipe(bits, fixed_point=powers), arithmetic=arithmetic)
        for bits in FIXED_POINT_WIDTHS
        for row, (powers, arithmetic) in rows.items()
    }
    return Table("Powers of two against free scales", list(rows), ways)


def ranges() -> Table:
    """Ways to the ranges of activations."""
    ways = {
        (name, f"{bits} bits"): Way(recipe, has_images)
        for bits in RANGE_WIDTHS
        for name, recipe, has_images in ways_to_ranges(qjax.recipe(bits))
    }
    rows = list(dict.fromkeys(row for row, _ in ways))
    return Table("Static, dynamic and weight-only, with images and without", rows, ways)


def tuning() -> Table:
    """Searches by the end and learned scales, with the finest formats and without."""
    ways = {}
    for column, (bits, fields) in TUNED.items():
        logits = {} if fields else {"logits": True}
        for name, more in {"": {}, FINEST: {**PER_CHANNEL, **logits}}.items():
            recipe = qjax.recipe(bits, **fields, **more)
            for row, changes in TUNING.items():
                ways[row + name, column] = Way(recipe, **changes)
    rows = [row + name for name in ("", FINEST) for row in TUNING]
    return Table("Ranges by the end, and tuned scales", rows, ways, error="plain")
