"""Params that the input picks from: embeddings, kernels of experts.

A table is read a row at a time, by `gather` and `dynamic_slice` at places that the input tells, or
by `ragged_dot`, whose groups it tells. No sum of products reads it as a layer's kernel is read, so
that it has no statistics of an input. With `Recipe.tables` its weights are codes.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import shape
from qjax.graph.layers import Network, Skipped
from qjax.graph.matmuls import find_matmuls
from qjax.recipe import Recipe

KIND = "table"


class Table(NamedTuple):
    """A params leaf that the input picks from.

    Attributes:
      name: its path in params, e.g. `embed/embedding`.
      var: the leaf.
      readers: positions of the equations that pick from it.
    """

    name: str
    var: core.Var
    readers: tuple[int, ...]

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """[rows, elements, channels]: a row of two axes or more has a scale per channel, its last.

        An embedding [rows, width] is [rows, width, 1], kernels of experts [experts, inputs,
        outputs] are as they are.
        """
        rows, *others = shape(self.var)
        channels = others[-1] if len(others) > 1 else 1
        return rows, math.prod(others) // channels, channels


def names_of_others(network: Network, recipe: Recipe) -> list[str]:
    """The names of what a recipe quantizes in a network beside its layers: matmuls and tables."""
    matmuls = find_matmuls(network) if recipe.quantizes_matmuls else ()
    tables = find_tables(network) if recipe.quantizes_tables else ()
    return [each.name for each in (*matmuls, *tables)]


def find_tables(network: Network) -> tuple[Table, ...]:
    """Finds the tables of a network, in the order of their first use.

    Args:
      network: a traced network.

    Examples:
      >>> from qjax.graph.layers import find_layers
      >>> params = {"embed": jnp.ones((5, 4)), "head": jnp.ones((4, 2))}
      >>> def apply_fn(params, tokens):
      ...     return params["embed"][tokens] @ params["head"]
      >>> network = find_layers(apply_fn, params, jnp.zeros((8, 3), jnp.int32))
      >>> [(table.name, table.matrix_shape) for table in find_tables(network)]
      [('embed', (5, 4, 1))]
    """
    names = dict(zip(network.flat.params, network.paths, strict=True))
    writer = {var: e for e in network.flat.equations for var in e.outvars}
    readers: dict[core.Var, list[int]] = {}
    for position in network.lookups:
        for var in _picked_from(network, position, writer, names):
            readers.setdefault(var, []).append(position)
    return tuple(Table(names[var], var, tuple(found)) for var, found in readers.items())


def _picked_from(
    network: Network,
    position: int,
    writer: dict[core.Var, core.JaxprEqn],
    names: dict[core.Var, str],
) -> list[core.Var]:
    """The params that an equation picks from, of those that have rows."""
    found = []
    for atom in network.flat.equations[position].invars:
        while atom in writer and writer[atom].primitive.name == "convert_element_type":
            atom = writer[atom].invars[0]
        if atom in names and len(shape(atom)) > 1 and _is_float(atom):
            found.append(atom)
    return found


def _is_float(atom: jaxpr.Atom) -> bool:
    return jnp.issubdtype(jaxpr.dtype(atom), jnp.floating)


def without_lookups(
    network: Network, skipped: Collection[Skipped], quantized: Collection[str]
) -> tuple[Skipped, ...]:
    """What stays in float where some tables are codes.

    A product with kernels that the input picks still multiplies in float.

    Args:
      network: a traced network.
      skipped: what stays in float otherwise.
      quantized: the names of these tables.
    """
    picked = {p for table in find_tables(network) if table.name in quantized for p in table.readers}
    positions = iter(network.lookups)
    return tuple(
        s
        for s in skipped
        if not (s.is_lookup and next(positions) in picked and s.primitive != "ragged_dot_general")
    )
