"""The chain of per-channel affine operations after a contraction: its bias, its batch norm."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import MOVEMENT, Atom, FlatJaxpr, dtype, shape
from qjax.graph.operation import Linear

_AFFINE = ("add", "sub", "mul", "div")


class ChannelOperation(NamedTuple):
    """One affine operation of the chain after a layer: `primitive(y, operand)`, or reversed.

    Attributes:
      primitive: add, sub, mul or div.
      operand: the atom, depending on params only, that y is combined with.
      axes: where the axes of `operand` lie among those of y (its other axes are shared).
      channel_axes: where the layer's channel axes lie in y at this point.
      ndim: the rank of y at this point.
      is_reversed: whether y is the second operand.
    """

    primitive: str
    operand: Atom
    axes: tuple[int, ...]
    channel_axes: tuple[int, ...]
    ndim: int
    is_reversed: bool


class Chain(NamedTuple):
    """A contraction and what is folded into it.

    Attributes:
      positions: of its equations, contraction first.
      operations: the affine operations among them.
      movement: the equations among them that only move elements.
      output: what the chain ends at.
    """

    positions: tuple[int, ...]
    operations: tuple[ChannelOperation, ...]
    movement: tuple[core.JaxprEqn, ...]
    output: core.Var


class Graph:
    """Who reads and who writes each variable of a flat jaxpr."""

    def __init__(self, flat: FlatJaxpr) -> None:
        self.equations: tuple[core.JaxprEqn, ...] = flat.equations
        self.constants: dict[core.Var, jax.Array] = flat.constants
        self.readers: dict[core.Var, list[int]] = collections.defaultdict(list)
        self.writer: dict[core.Var, core.JaxprEqn] = {}
        for position in sorted(jaxpr.needed(flat)):
            equation = flat.equations[position]
            for var in jaxpr.variables(equation.invars):
                self.readers[var].append(position)
            self.writer.update(dict.fromkeys(equation.outvars, equation))
        for var in jaxpr.variables(flat.outputs):
            self.readers[var].append(len(flat.equations))

    def only_reader(self, var: core.Var) -> int | None:
        """The position of the one equation that reads `var`, None for several or an output."""
        readers = self.readers[var]
        if len(readers) != 1 or readers[0] == len(self.equations):
            return None
        return readers[0]


def affine_chain(
    graph: Graph,
    found: Mapping[core.Var, jaxpr.Dependence],
    position: int,
    operation: Linear,
    most: int | None = None,
) -> Chain:
    """Follows the per-channel affine operations after a contraction, `most` of them.

    Operations that only move elements are followed too, and kept if an affine one comes after.
    """
    var = graph.equations[position].outvars[0]
    ndim = len(shape(var))
    channel_axes = tuple(axis % ndim for axis in operation.channel_axes)
    chain, affine, movement = [position], [], []
    kept = Chain((position,), (), (), var)
    while len(affine) != most and (reader := graph.only_reader(var)) is not None:
        equation = graph.equations[reader]
        moved = _moved_axes(equation, channel_axes)
        if moved is not None:
            movement.append(equation)
            channel_axes = moved
        else:
            step = _channel_operation(graph, found, equation, var, channel_axes)
            if step is None:
                break
            affine.append(step)
        chain.append(reader)
        var = equation.outvars[0]
        if moved is None:
            kept = Chain(tuple(chain), tuple(affine), tuple(movement), var)
    return kept


def _channel_operation(
    graph: Graph,
    found: Mapping[core.Var, jaxpr.Dependence],
    equation: core.JaxprEqn,
    var: core.Var,
    channel_axes: tuple[int, ...],
) -> ChannelOperation | None:
    primitive = equation.primitive.name
    if primitive not in _AFFINE:
        return None
    is_reversed = equation.invars[0] is not var
    operand = equation.invars[0 if is_reversed else 1]
    if operand is var or (primitive == "div" and is_reversed):
        return None
    if jaxpr.depends_on([operand], found).x:
        return None
    ndim = len(shape(var))
    if shape(equation.outvars[0]) != shape(var):
        return None
    source: Any = operand
    axes = tuple(range(len(shape(operand))))
    writer = None if jaxpr.is_literal(source) else graph.writer.get(source)
    if writer is not None and writer.primitive.name == "broadcast_in_dim":
        axes = tuple(writer.params["broadcast_dimensions"])
        source = writer.invars[0]
    per_channel = all(
        size == 1 or axis in channel_axes for axis, size in zip(axes, shape(source), strict=True)
    )
    return (
        ChannelOperation(primitive, source, axes, channel_axes, ndim, is_reversed)
        if per_channel
        else None
    )


def _moved_axes(equation: core.JaxprEqn, channel_axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where an operation that only moves elements puts the channel axes, None if it does more."""
    name, params = equation.primitive.name, equation.params
    if name not in MOVEMENT:
        return None
    before = shape(equation.invars[0])
    after = shape(equation.outvars[0])
    if name in ("convert_element_type", "copy"):
        is_float = jax.numpy.issubdtype(dtype(equation.outvars[0]), jax.numpy.floating)
        return channel_axes if is_float else None
    if name == "transpose":
        return tuple(params["permutation"].index(axis) for axis in channel_axes)
    if name == "broadcast_in_dim":
        if math.prod(before) != math.prod(after):
            return None
        return tuple(params["broadcast_dimensions"][axis] for axis in channel_axes)
    if params.get("dimensions") and name == "reshape":
        return None
    moved = [_reshaped_axis(before, after, axis) for axis in channel_axes]
    found = tuple(axis for axis in moved if axis is not None)
    return found if len(found) == len(moved) else None


def _reshaped_axis(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    inner = math.prod(before[axis + 1 :])
    for candidate, size in enumerate(after):
        if size == before[axis] and math.prod(after[candidate + 1 :]) == inner:
            return candidate
    return None
