"""A quantized network as a function of its scales and biases, chosen or learned.

The scales are s = s₀·exp(u), so that they stay positive and a step of u is a share of s, whatever
the unit; the biases are in real units. Codes of kernels and all zero points stay.

The network computes with what will be written back: biases round(b / (s_w·s_x)) in int32, scales of
outputs in 16 significant bits (see `qjax.formats.affine.with_exact_products`). The gradient passes
straight through these roundings and those of the values:

  x̂ = s·round(clip(x / s)),  ∂x̂/∂s = round(x / s) − x / s  inside of the range, else its limit.

References:
  Esser et al., 2020, arXiv:1902.08153, eq. 3 (LSQ); Bengio et al., 2013, arXiv:1308.3432
  (straight-through estimator).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.formats.affine import QParams, straight_through, with_exact_products
from qjax.graph.activation import follow_codes
from qjax.graph.junctions import Junction
from qjax.graph.layers import Network, Site
from qjax.graph.matmuls import Matmul
from qjax.graph.operation import Linear
from qjax.graph.schedule import Activated
from qjax.run.function import steps_of
from qjax.run.layer import QuantizedLayer, accumulator_scale, dequantized_bias
from qjax.run.matmul import OPERANDS

_MOST_BIAS = 2.0**30  # in units of s_w·s_x: the products have the other half of int32
_GRIDS = ("inputs", "outputs", "activated")  # fields of a layer
_READ = ("inputs", *OPERANDS)  # fields of what is read

Place = tuple[str, str]  # a layer or a matmul and a field of it; a junction and ""


class Moving(NamedTuple):
    """What the network is a function of, float32.

    Attributes:
      weights: u of the scales of a kernel, of their shape, by layer.
      grids: u of the scales of a grid of activations, by the place that owns the grid.
      biases: b in real units, [groups * channels], by layer.
    """

    weights: dict[str, jax.Array]
    grids: dict[str, jax.Array]
    biases: dict[str, jax.Array]


class Frame(NamedTuple):
    """What stays as it is while scales and biases move.

    Attributes:
      operations: of the layers, by name.
      owners: of the place of every grid, the place that owns it: an input that lies on the grid of
        an output shares that.
      exact: the owners whose scales have 16 significant bits.
    """

    operations: Mapping[str, Linear]
    owners: Mapping[Place, Place]
    exact: frozenset[Place]

    @property
    def key(self) -> tuple[Any, ...]:
        """A hashable value that no other frame of the same network has."""
        return tuple(self.owners.items()), self.exact


def frame_of(network: Network, params: Mapping[str, Any]) -> Frame:
    """Finds what stays, and which grids are one.

    Args:
      network: the network.
      params: of `Quantized`.
    """
    operations = {site.layer.name: site.layer.operation for site in network.first_sites}
    parents: dict[Place, Place] = {}

    def root(place: Place) -> Place:
        while parents[place] != place:
            place = parents[place]
        return place

    lies_on: dict[core.Var, Place] = {}
    steps, read = steps_of(network, params)

    def read_on(var: core.Var, place: Place, grid: QParams) -> None:
        """An operand that lies on the grid of what was written shares it."""
        before = lies_on.get(var)
        parents.setdefault(place, place)
        if before is not None and is_same(grid_at(params, before), grid):
            parents[root(place)] = root(before)

    def note(var: core.Var, place: Place, grid: Any) -> None:
        if isinstance(grid, QParams):
            parents.setdefault(place, place)
            lies_on[var] = place

    for step in steps:
        match step:
            case Site(layer=described):
                name = described.name
                layer = read[name]
                if layer.grid is not None:
                    read_on(step.input, (name, "inputs"), layer.grid)
                note(step.output, (name, "outputs"), layer.outputs)
            case Activated(site=site):
                name = site.layer.name
                note(site.activated, (name, "activated"), read[name].activated)
            case Junction():
                note(step.var, (step.name, ""), read[step.name])
            case Matmul():
                matmul = read[step.name]
                for var, field in zip(step.operands, OPERANDS, strict=True):
                    read_on(var, (step.name, field), getattr(matmul, field))
                note(step.output, (step.name, "outputs"), matmul.outputs)
            case _:
                follow_codes(step, lies_on, lambda place: _greatest(grid_at(params, place)))
    owners = {place: root(place) for place in parents}
    exact = frozenset(owner for (_, field), owner in owners.items() if field not in _READ)
    return Frame(operations, owners, exact)


def key_of(owner: Place) -> str:
    """The key of a grid in `Moving.grids`, by the place that owns it."""
    return "/".join(filter(None, owner))


def grid_at(params: Mapping[str, Any], place: Place) -> QParams:
    """The grid at a place."""
    name, field = place
    if not field:
        return params["sums"][name]
    products = params.get("matmuls", {})
    return getattr(products[name] if name in products else params["layers"][name], field)


def is_same(one: QParams, other: QParams) -> bool:
    """Whether two grids have the same codes for the same values."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return one.scale.shape == other.scale.shape and all(bool(jnp.all(a == b)) for a, b in leaves)


def _greatest(grid: QParams) -> float:
    return float(jnp.max(grid.range[1]))


def start(frame: Frame, params: Mapping[str, Any]) -> Moving:
    """The parameters at which the network is what it was."""
    layers: Mapping[str, QuantizedLayer] = params["layers"]
    return Moving(
        {
            name: jnp.zeros(layer.weights.step.shape, jnp.float32)
            for name, layer in layers.items()
            if layer.weights is not None
        },
        {
            key_of(owner): jnp.zeros(grid_at(params, owner).scale.shape, jnp.float32)
            for owner in sorted(set(frame.owners.values()))
        },
        {name: dequantized_bias(frame.operations[name], layer) for name, layer in layers.items()},
    )


def moved(
    frame: Frame, params: Mapping[str, Any], moving: Moving, is_final: bool = False
) -> dict[str, Any]:
    """The network with other scales and biases, in the form of `Quantized.params`; differentiable.

    Args:
      frame: what stays.
      params: of the network before.
      moving: the parameters of the moment.
      is_final: whether integer biases are to be int32; else the same numbers in float32.
    """

    def grid(place: Place, format: Any) -> Any:
        if place not in frame.owners:
            return format
        owner = frame.owners[place]
        factor = jnp.exp(moving.grids[key_of(owner)])
        found = format.scaled(factor)
        if owner not in frame.exact:
            return found
        scale = straight_through(with_exact_products(found).scale, found.scale)
        return dataclasses.replace(found, scale=scale)

    def layer_of(name: str, layer: QuantizedLayer) -> QuantizedLayer:
        formats = {field: grid((name, field), getattr(layer, field)) for field in _GRIDS}
        if layer.weights is not None:
            formats["weights"] = layer.weights.scaled(jnp.exp(moving.weights[name]))
        found = dataclasses.replace(layer, **formats)
        bias = moving.biases[name]
        if found.has_integer_accumulator:
            bias = _in_units(bias, accumulator_scale(frame.operations[name], found))
            bias = bias.astype(jnp.int32) if is_final else bias
        return dataclasses.replace(found, bias=bias)

    layers = {name: layer_of(name, layer) for name, layer in params["layers"].items()}
    found = {**params, "layers": layers}
    if "sums" in params:
        found["sums"] = {name: grid((name, ""), format) for name, format in params["sums"].items()}
    if "matmuls" in params:
        found["matmuls"] = {
            name: matmul._replace(
                **{field: grid((name, field), format) for field, format in matmul.formats.items()}
            )
            for name, matmul in params["matmuls"].items()
        }
    return found


def _in_units(bias: jax.Array, unit: jax.Array) -> jax.Array:
    """Rounds a bias to codes at the accumulator's scale, which leave room for the products."""
    codes = jnp.clip(bias / unit, -_MOST_BIAS, _MOST_BIAS)
    return straight_through(jnp.round(codes), codes)
