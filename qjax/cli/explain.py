"""`qjax explain`: one layer followed step by step on a test image."""

import argparse

import jax.numpy as jnp

from qjax import charts
from qjax.atomic import write
from qjax.cli import command
from qjax.cli.loading import Loaded
from qjax.graph.layers import find_layers, shapes_of
from qjax.graph.matmuls import find_matmuls
from qjax.graph.tables import names_of_others
from qjax.page import quantization
from qjax.progress import Progress
from qjax.quantize import quantize
from qjax.recipe import Recipe
from qjax.run.tap import float_layers, tapped
from qjax.study.curves import Curves, layer_curves
from qjax.study.explain import explain
from qjax.table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what only this command takes."""
    add = parser.add_argument_group("what to explain").add_argument
    add("layer", metavar="LAYER", help="name of a layer, e.g. layer1/block0/conv1")
    add("--image", type=int, default=0, metavar="N", help="test image to follow (%(default)s)")
    add("--ranges", action="store_true", help="compare the cost functions of the layer's ranges")
    add(
        "--report",
        metavar="FILE",
        help="draw the cost functions of the ranges on a page: ranges.html",
    )


def answer(
    arguments: argparse.Namespace,
    loaded: Loaded,
    recipe: Recipe,
    progress: Progress,
) -> str:
    """Quantizes a model and explains one of its layers.

    Args:
      arguments: of the command.
      loaded: the model and its images.
      recipe: how to quantize.
      progress: of the quantization.

    Returns:
      The text to print.

    Raises:
      ValueError: there is no such image or layer.
    """
    if arguments.report is not None:
        charts.require()
    model, calibration, test = loaded
    if not 0 <= arguments.image < len(test.images):
        raise ValueError(
            f"`--image` must be from 0 to {len(test.images) - 1}; got {arguments.image}."
        )
    images = shapes_of(jnp.asarray(calibration[:1]))
    network = find_layers(model.apply_fn, shapes_of(model.params), images)
    sites = {site.layer.name: site for site in network.sites}
    name = arguments.layer
    matmuls = [m.name for m in find_matmuls(network)] if recipe.quantizes_matmuls else []
    if name not in (*sites, *matmuls):
        raise ValueError(f"`LAYER` must be one of {', '.join([*sites, *matmuls])}; got {name!r}.")
    wants_curves = arguments.ranges or arguments.report is not None
    if wants_curves and name not in sites:
        raise ValueError(
            f"`--ranges` and `--report` show the ranges of layers; {name!r} is a product of two "
            "activations. Leave them out."
        )
    q = quantize(model.apply_fn, model.params, calibration, recipe, progress=progress)
    x = model.preprocess(test.images[arguments.image : arguments.image + 1])
    text = str(explain(q, name, x, model.params))
    if not wants_curves:
        return text
    floats = float_layers(network, model.params)
    sample = jnp.asarray(calibration[:256])
    taps = tapped(model.apply_fn, shapes_of(model.params), sample, [name])(floats, sample)[1]
    formats = recipe.by_layer(list(sites), names_of_others(network, recipe))[name]
    curves = layer_curves(sites[name], floats["layers"][name], taps[name].input, formats)
    if arguments.report is not None:
        title = f"{model.name}, {name}: how the ranges were found"
        write(arguments.report, quantization.render_curves(title, {name: curves}))
    return "\n\n".join([text, *map(describe_curves, curves)])


def describe_curves(curves: Curves) -> str:
    """Writes what each cost function chooses, and what the layer's output says to that."""
    header = ("cost function", "range kept", "tensor dB", "output dB", "")
    rows = [
        (
            choice.method,
            f"{choice.share:.1%}",
            f"{choice.tensor_sqnr_db:.1f}",
            f"{choice.output_sqnr_db:.1f}",
            " best" if choice is curves.best else "",
        )
        for choice in curves.choices
    ]
    columns = table(header, rows, "<>>><", ruled=False, gap=1, widths=(14, 10, 10, 10, 5))
    return f"the range of the {curves.tensor}, {curves.bits} bits\n{columns}"


COMMAND = command.question(
    "explain", "follow one layer step by step on a test image", add_arguments, answer
)
