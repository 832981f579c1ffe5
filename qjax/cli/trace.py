"""`qjax trace`: the layers of a model, before anything is quantized."""

import argparse

import pretrained
from qjax.cli.arguments import add_network
from qjax.cli.command import Command
from qjax.cli.loading import an_image
from qjax.cli.output import columns
from qjax.graph.layers import Network, check_layers, find_layers, shapes_of
from qjax.report import in_float, product, si
from qjax.table import table

HEADER = ("layer", "kind", "kernel", "input", "output", "activation", "MACs")
SPARED = ("input", "activation", "kind", "output", "MACs", "kernel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add = parser.add_argument
    add_network(add)
    add("--quiet", action="store_true", help="write no notes to standard error")


def run(arguments: argparse.Namespace) -> None:
    """Traces a model on one image and prints its layers.

    Raises:
      ValueError: there is no such model or dataset, or a layer cannot be rewritten.
    """
    model = pretrained.load(arguments.model)
    x = an_image(model, arguments.dataset)
    network = find_layers(model.apply_fn, model.params, shapes_of(x))
    check_layers(network)
    print(describe(network, columns()))


def describe(network: Network, width: int) -> str:
    """The layers as a table, and what stays in float."""
    layers = [site.layer for site in network.first_sites]
    rows = [
        (
            *(layer.name, layer.kind, product(layer.kernel_shape)),
            *(product(layer.input_shape[1:]), product(layer.output_shape[1:])),
            *(layer.activation, si(layer.macs)),
        )
        for layer in layers
    ]
    total = (f"{len(layers)} layers", *[""] * 5, si(sum(layer.macs for layer in layers)))
    layers_text = table(HEADER, rows, "<<<<<<>", footer=total, most=width, spared=SPARED)
    return "\n".join([layers_text, *in_float(network.skipped, width)])


COMMAND = Command(
    "trace",
    "list the layers of a model",
    "Lists the layers that would be quantized, by the names that `--override` matches, and what "
    "stays in float.",
    add_arguments,
    run,
)
