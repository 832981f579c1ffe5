"""Fitting a junction: the range of a value that no layer computes."""

from typing import Any, NamedTuple

import jax

from qjax.fit.layer import decibels, energies
from qjax.fit.ranges import choose_output, project_batches, values_between
from qjax.fit.search import Candidates
from qjax.formats.affine import QParams
from qjax.graph.activation import Activation
from qjax.programs import program
from qjax.recipe import Recipe


class FittedJunction(NamedTuple):
    """A fitted junction and how well it does; numbers may still be on their way from the device.

    Attributes:
      grid: scalars.
      energies: of it after the activation in the float network, and of the difference from it: sums
        by batch.
      clip: the clipping range's share of the range of its values.
      shape: of its value, batch included.
    """

    grid: QParams
    energies: tuple[jax.Array, jax.Array]
    clip: Any
    shape: tuple[int, ...]

    @property
    def sqnr_db(self) -> float:
        """SQNR after the activation, against the float network's."""
        return decibels(self.energies)


def fit_junction(
    activation: Activation, recipe: Recipe, floats: jax.Array, values: jax.Array
) -> tuple[FittedJunction, jax.Array]:
    """Chooses the range of a junction as that of a layer's output: E‖act(ẑ) − act(z)‖².

    Args:
      activation: what follows it.
      recipe: of the network.
      floats: z, its values in the float network, [batches, ...].
      values: ẑ, those that its quantized predecessors produce.

    Returns:
      What was fitted, and the values on its grid.
    """
    spec, objective = recipe.sum_spec, recipe.objective
    sampled = values_between(objective, activation, floats, values)
    grid, clip = choose_output(
        sampled,
        spec.limits,
        objective=objective,
        spec=spec.stored,
        activation=activation,
        candidates=Candidates(recipe.grid_size, recipe.refinements),
    )
    rounded, energies = _rounded(activation, grid, floats, values)
    return FittedJunction(grid, energies, clip, values.shape[1:]), rounded


@program(static_argnums=0)
def _rounded(
    activation: Activation, grid: QParams, floats: jax.Array, values: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = project_batches(grid, values)
    shown, shown_hat = activation.function(floats), activation.function(rounded)
    return rounded, energies(shown, shown_hat)
