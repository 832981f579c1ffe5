"""Fitting the ranges of values that no layer computes: junctions, operands and results of matmuls.

What a product of two activations multiplies is rounded to the codes of least error of the operand
itself, E‖x̂ − x‖², unless it lies on a grid already.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit.layer import decibels, energies
from qjax.fit.ranges import choose_output, project_batches, values_between
from qjax.fit.search import Candidates
from qjax.fit.streams import map_batches
from qjax.formats.affine import QParams
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import NONE, Activation
from qjax.graph.matmuls import MatrixProduct
from qjax.objectives.base import Objective
from qjax.programs import program
from qjax.recipe import LayerRecipe, Recipe
from qjax.run.matmul import QuantizedMatmul, apply_matmul

Values = tuple[jax.Array, jax.Array]


class FittedJunction(NamedTuple):
    """A fitted value and how well it does; numbers may still be on their way from the device.

    Attributes:
      grid: scalars; None for a result of a matmul that stays in float.
      energies: of it after the activation in the float network, and of the difference from it: sums
        by batch.
      clip: the clipping range's share of the range of its values.
      shape: of its value, batch included.
    """

    grid: QParams | None
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
    candidates = Candidates(recipe.grid_size, recipe.refinements)
    return _fit(activation, recipe.objective, recipe.sum_spec, candidates, (floats, values))


def _fit(
    activation: Activation,
    objective: Objective,
    spec: QuantSpec,
    candidates: Candidates,
    pair: Values,
    known: QParams | None = None,
    is_exact: bool = True,
) -> tuple[FittedJunction, jax.Array]:
    """Chooses the range of a value, unless its grid is known, and rounds to it."""
    floats, values = pair
    grid, clip = known, jnp.ones((), jnp.float32)
    if grid is None:
        grid, clip = choose_output(
            values_between(objective, activation, floats, values),
            spec.limits,
            objective=objective,
            spec=spec.stored,
            activation=activation,
            candidates=candidates,
            is_exact=is_exact,
        )
    rounded, found = _rounded(activation, grid, floats, values)
    return FittedJunction(grid, found, clip, values.shape[1:]), rounded


class FittedMatmul(NamedTuple):
    """A fitted product of two activations.

    Attributes:
      lhs: its first operand.
      rhs: its second operand.
      outputs: its result.
    """

    lhs: FittedJunction
    rhs: FittedJunction
    outputs: FittedJunction

    @property
    def quantized(self) -> QuantizedMatmul:
        """Its grids."""
        assert self.lhs.grid is not None and self.rhs.grid is not None
        return QuantizedMatmul(self.lhs.grid, self.rhs.grid, self.outputs.grid)

    def by_name(self, name: str) -> dict[str, FittedJunction]:
        """What was fitted, by names of its own."""
        return {f"{name}/{field}": fitted for field, fitted in self._asdict().items()}

    @classmethod
    def found(cls, name: str, fits: Mapping[str, FittedJunction]) -> "FittedMatmul | None":
        """The matmul of that name in what was fitted; None if it is not there."""
        names = [f"{name}/{field}" for field in cls._fields]
        return cls._make(map(fits.__getitem__, names)) if fits.keys() >= {*names} else None


def fit_matmul(
    product: MatrixProduct,
    recipe: LayerRecipe,
    candidates: Candidates,
    lhs: Values,
    rhs: Values,
    known: Sequence[QParams | None],
) -> tuple[FittedMatmul, Values]:
    """Chooses the ranges of the operands of a product, and of its result.

    Args:
      product: the operation.
      recipe: the formats, those of `inputs` and `outputs`, one scale to a tensor.
      candidates: of the searches.
      lhs: the first operand in the float and in the quantized network, float32[batches, ...].
      rhs: the second one.
      known: the grids that the operands lie on already.

    Returns:
      What was fitted, and the result in the float and in the quantized network.
    """
    assert recipe.inputs is not None
    objective = recipe.objective
    spec = recipe.inputs.per_tensor
    left, right = (
        _fit(NONE, objective, spec, candidates, pair, grid, is_exact=False)[0]
        for pair, grid in zip((lhs, rhs), known, strict=True)
    )
    floats = float_product(product, lhs[0], rhs[0])
    assert left.grid is not None and right.grid is not None
    operands = QuantizedMatmul(left.grid, right.grid, None)
    values = quantized_product(product, operands, lhs[1], rhs[1])
    if recipe.outputs is None:
        ones = jnp.ones((), jnp.float32)
        result = FittedJunction(None, _energies(floats, values), ones, values.shape[1:])
    else:
        spec = recipe.outputs.per_tensor
        result, _ = _fit(NONE, objective, spec, candidates, (floats, values))
        values = quantized_product(product, operands._replace(outputs=result.grid), lhs[1], rhs[1])
    return FittedMatmul(left, right, result), (floats, values)


_energies = program()(energies)


@program(static_argnums=0)
def float_product(product: MatrixProduct, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The result of a product in float on all batches, float32[batches, ...]."""
    return map_batches(lambda pair: product.evaluate(*pair), (lhs, rhs))


@program(static_argnums=0)
def quantized_product(
    product: MatrixProduct, matmul: QuantizedMatmul, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """The result of a quantized product on all batches, float32[batches, ...]."""
    return map_batches(lambda pair: apply_matmul(product, matmul, *pair), (lhs, rhs))


def float_or_quantized(
    product: MatrixProduct, matmul: QuantizedMatmul | None, lhs: Values, rhs: Values
) -> Values:
    """The result of a product in the float and in the quantized network.

    Args:
      product: the operation.
      matmul: its grids; None where they are not known yet.
      lhs: float32[batches, ...] each, as `rhs`.
      rhs: the second operand.
    """
    floats = float_product(product, lhs[0], rhs[0])
    if matmul is None:
        return floats, float_product(product, lhs[1], rhs[1])
    return floats, quantized_product(product, matmul, lhs[1], rhs[1])


@program(static_argnums=0)
def _rounded(
    activation: Activation, grid: QParams, floats: jax.Array, values: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = project_batches(grid, values)
    shown, shown_hat = activation.function(floats), activation.function(rounded)
    return rounded, energies(shown, shown_hat)
