"""Rounding a table: every row on its own, by the error of the row itself, E‖ŵ − w‖²."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit.layer import round_kernel
from qjax.fit.search import Candidates
from qjax.graph import jaxpr
from qjax.graph.tables import Table
from qjax.objectives.table import OBJECTIVES
from qjax.recipe import LayerRecipe
from qjax.rounding.nearest import NEAREST
from qjax.run.table import QuantizedTable


class FittedTable(NamedTuple):
    """A rounded table and how well it does.

    Attributes:
      quantized: its codes.
      sqnr_db: against the float table.
      clip: the scales' share of those that the extremes need, their mean.
    """

    quantized: QuantizedTable
    sqnr_db: jax.Array
    clip: jax.Array

    def values(self, table: Table) -> jax.Array:
        """What its codes stand for."""
        return self.quantized.values(jaxpr.shape(table.var), jaxpr.dtype(table.var))


def fit_table(
    table: Table, values: jax.Array, recipe: LayerRecipe, candidates: Candidates
) -> FittedTable:
    """Chooses the ranges of the rows of a table and rounds them to the nearest code.

    Args:
      table: the table.
      values: its float values.
      recipe: the format is that of `weights`.
      candidates: of the search of ranges.
    """
    stored = recipe.stored
    assert stored.weights is not None
    rounded = round_kernel(
        values.astype(jnp.float32).reshape(table.matrix_shape),
        None,
        recipe.limits["weights"],
        spec=stored.weights,
        objective=OBJECTIVES["mse"] if stored.objective.sees_output else stored.objective,
        rounding=NEAREST,
        sweeps=0,
        candidates=candidates,
    )
    quantized = QuantizedTable(rounded.codes, rounded.format)
    return FittedTable(quantized, rounded.sqnr_db, rounded.clip)
