"""`qjax trace`: the layers of a model, before anything is quantized."""

import argparse
from collections.abc import Sequence
from typing import get_args

import pretrained
from qjax.cli.arguments import add_network
from qjax.cli.command import Command
from qjax.cli.loading import an_image
from qjax.cli.output import columns
from qjax.graph.jaxpr import shape
from qjax.graph.layers import Layer, Network, check_layers, find_layers, shapes_of
from qjax.graph.matmuls import KIND, Matmul, find_matmuls, left_in_float
from qjax.graph.tables import KIND as TABLE
from qjax.graph.tables import Table, find_tables, without_lookups
from qjax.recipe import Matmuls, Recipe, Tables
from qjax.report import in_float, product, si
from qjax.table import table

HEADER = ("layer", "kind", "kernel", "input", "output", "activation", "MACs")
SPARED = ("input", "activation", "kind", "output", "MACs", "kernel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add = parser.add_argument
    add_network(add)
    for option, choices, default, what in (
        ("--matmuls", Matmuls, Recipe.matmuls, "products of two activations"),
        ("--tables", Tables, Recipe.tables, "params that the input picks from"),
    ):
        names = get_args(choices)
        text = f"{what}: {', '.join(names)} ({default})"
        add(option, choices=names, default=default, metavar="NAME", help=text)
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
    matmuls = find_matmuls(network) if arguments.matmuls == "quantized" else ()
    tables = find_tables(network) if arguments.tables == "quantized" else ()
    print(describe(network, columns(), matmuls, tables))


def describe(
    network: Network, width: int, matmuls: Sequence[Matmul] = (), tables: Sequence[Table] = ()
) -> str:
    """The layers, quantized tables and products as a table, and what stays in float."""
    layers = [site.layer for site in network.first_sites]
    rows = [*map(_table_row, tables), *_matmul_rows("", matmuls)]
    for layer in layers:
        rows += [_layer_row(layer), *_matmul_rows(layer.name, matmuls)]
    macs = sum(record.macs for record in (*layers, *matmuls))
    total = (f"{len(layers)} layers", *[""] * 5, si(macs))
    skipped = left_in_float(network, [matmul.name for matmul in matmuls])
    skipped = without_lookups(network, skipped, [table.name for table in tables])
    layers_text = table(HEADER, rows, "<<<<<<>", footer=total, most=width, spared=SPARED)
    return "\n".join([layers_text, *in_float(skipped, width)])


def _layer_row(layer: Layer) -> tuple[str, ...]:
    return (
        *(layer.name, layer.kind, product(layer.kernel_shape)),
        *(product(layer.input_shape[1:]), product(layer.output_shape[1:])),
        *(layer.activation, si(layer.macs)),
    )


def _table_row(table: Table) -> tuple[str, ...]:
    return table.name, TABLE, product(shape(table.var)), "", "", "none", ""


def _matmul_rows(layer: str, matmuls: Sequence[Matmul]) -> list[tuple[str, ...]]:
    """Those after a layer; its second operand stands where a layer has its kernel."""
    return [
        (
            *(matmul.name, KIND),
            *map(product, (right, left, result)),
            *("none", si(matmul.macs)),
        )
        for matmul in matmuls
        for left, right, result in [matmul.shapes]
        if matmul.layer == layer
    ]


COMMAND = Command(
    "trace",
    "list the layers of a model",
    "Lists the layers that would be quantized, by the names that `--override` matches, and what "
    "stays in float.",
    add_arguments,
    run,
)
