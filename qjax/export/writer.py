"""Values of a network as tensors of a graph of ONNX nodes, in whatever order their axes lie.

ONNX convolves with channels first and JAX mostly with channels last. A transposition is therefore
not written down where it stands but remembered, and what acts on elements or along axes takes a
tensor as it lies: a network of convolutions is transposed once, at its input. In the same way an
array that is repeated along an axis is held once.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core
from onnx import helper

from qjax.export.nodes import Graph
from qjax.export.sizes import Batch, Sizes
from qjax.formats.affine import QParams
from qjax.graph import jaxpr
from qjax.graph.jaxpr import Atom, shape
from qjax.targets import Target

Bounds = tuple[float, float]
EVERYTHING = (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that depends on the input; values that do not are arrays.

    Attributes:
      name: of the tensor in the graph.
      order: axis i of the tensor is axis `order[i]` of the value.
      repeated: the axes of the value that the tensor holds once.
      bounds: what no element exceeds.
      grid: the names of scale and zero point of the codes that it was read from, if it was.
      mean: where it is a sum, (the name of the mean, the number of summands).
    """

    name: str
    order: tuple[int, ...]
    repeated: frozenset[int] = frozenset()
    bounds: Bounds = EVERYTHING
    grid: tuple[str, str] | None = None
    mean: tuple[str, int] | None = None


Value = Any  # a Tensor or an array


class Writer:
    """Writes a network into a graph.

    Attributes:
      graph: what is written.
      target: what is to run it.
      after: the last layer that was written, None before the first.
    """

    def __init__(self, sizes: Mapping[core.Var, Sizes], inputs: Any, target: Target) -> None:
        """Takes the sizes of all variables, and the tensor and axis that hold the examples."""
        self.graph: Graph = Graph()
        self.target = target
        self.after: str | None = None
        self._sizes = sizes
        self._input = inputs

    # ---- Sizes

    def sizes(self, atom: Atom) -> Sizes:
        """The sizes of an atom's value."""
        return shape(atom) if jaxpr.is_literal(atom) else self._sizes[atom]

    def reshaped(self, name: str, sizes: Sizes) -> str:
        """A tensor in another shape, of which one axis at most grows with the examples."""
        assert sum(isinstance(size, Batch) for size in sizes) <= 1
        numbers = [-1 if isinstance(size, Batch) else size for size in sizes]
        return self.graph.node("Reshape", name, self.integers(numbers))

    def expanded(self, name: str, sizes: Sizes) -> str:
        """A tensor repeated along its axes of size 1."""
        if not any(isinstance(size, Batch) for size in sizes):
            return self.graph.node("Expand", name, self.integers(sizes))
        examples = self.graph.node("Shape", self._input, start=0, end=1)
        parts = [
            self.graph.node("Mul", examples, self.integers([size.times]))
            if isinstance(size, Batch)
            else self.integers([size])
            for size in sizes
        ]
        return self.graph.node("Expand", name, self.graph.node("Concat", *parts, axis=0))

    def integers(self, numbers: Any) -> str:
        """A constant of int64, as shapes and axes are."""
        return self.graph.constant(np.asarray(numbers, np.int64))

    # ---- Operands

    def tensor(self, value: Value, atom: Atom) -> Tensor:
        """A value as a tensor, which an array becomes that loops start with."""
        if isinstance(value, Tensor):
            return value
        array, repeated = self.condensed(value, atom)
        return Tensor(self.graph.constant(array), tuple(range(array.ndim)), repeated)

    def arranged(
        self, value: Value, atom: Atom, order: Sequence[int], keeps_repeated: bool = False
    ) -> str:
        """The name of a value's tensor with its axes in some order.

        Args:
          value: a `Tensor` or an array.
          atom: that it belongs to.
          order: axis i of the result is axis `order[i]` of the value.
          keeps_repeated: whether axes along which nothing changes may have size 1.
        """
        if isinstance(value, Tensor):
            name, repeated = self._transposed(value, order), value.repeated
        else:
            array, repeated = self.condensed(value, atom)
            name = self.graph.constant(array.transpose(order))
        if repeated and not keeps_repeated:
            sizes = self.sizes(atom)
            name = self.expanded(name, tuple(sizes[axis] for axis in order))
        return name

    def placed(self, value: Tensor, atom: Atom, order: Sequence[int]) -> Tensor:
        """A value's tensor with its axes in some order."""
        name = self.arranged(value, atom, order)
        if name == value.name:
            return dataclasses.replace(value, order=tuple(order))
        return Tensor(name, tuple(order), bounds=value.bounds)

    def plain(self, value: Value, atom: Atom) -> str:
        """The name of a value's tensor as JAX has it."""
        return self.arranged(value, atom, range(len(shape(atom))))

    def _transposed(self, value: Tensor, order: Sequence[int]) -> str:
        moves = [value.order.index(axis) for axis in order]
        if moves == sorted(moves):
            return value.name
        return self.graph.node("Transpose", value.name, perm=moves)

    def condensed(self, value: Any, atom: Atom) -> tuple[np.ndarray, frozenset[int]]:
        """An array held once along the axes where nothing changes, and these axes.

        Raises:
          ValueError: it differs from example to example.
        """
        array = np.asarray(value, jaxpr.dtype(atom))
        repeated = set()
        for axis, size in enumerate(self.sizes(atom)):
            if size == 1:
                continue
            first = array.take([0], axis)
            if array.size and ((array == first) | (array != array)).all():  # NaN is like NaN
                array = first
                repeated.add(axis)
            elif isinstance(size, Batch):
                raise ValueError(
                    f"{self.where} stands a constant with other values for every example, of shape "
                    f"{shape(atom)}; make it from the input, or pass it as an input."
                )
        return array, frozenset(repeated)

    def scalar(self, value: Value, atom: Atom) -> float | None:
        """The number that a constant has everywhere, None for anything else."""
        if isinstance(value, Tensor):
            return None
        array, _ = self.condensed(value, atom)
        return float(array.reshape(())) if array.size == 1 else None

    # ---- Codes

    def rounded(self, value: Tensor, qparams: QParams, axis: int | None = None) -> Tensor:
        """Rounds a tensor to the values that codes stand for.

        Args:
          value: float32, real units.
          qparams: of its codes.
          axis: of the tensor, along which scales lie if there are several.
        """
        scale, zero_point = np.asarray(qparams.scale), np.asarray(qparams.zero_point)
        if scale.size == 1:
            scale, zero_point, axis = scale.reshape(()), zero_point.reshape(()), None
        else:
            scale, zero_point = scale.reshape(-1), zero_point.reshape(-1)
        codes = zero_point.astype(qparams.dtype)
        grid = self.graph.constant(scale, "scale"), self.graph.constant(codes, "zero_point")
        limits = np.iinfo(qparams.dtype)
        low, high = (scale * (int(q) - zero_point) for q in (qparams.qmin, qparams.qmax))
        narrow = (
            low if qparams.qmin > limits.min and np.any(value.bounds[0] < low) else None,
            high if qparams.qmax < limits.max and np.any(value.bounds[1] > high) else None,
        )
        is_narrow = any(limit is not None for limit in narrow)
        if value.grid == grid and not is_narrow:
            return value
        result = self._limited(value, narrow, axis) if self.target.clips_first else value
        result = self._to_grid(result, grid, axis)
        if is_narrow and not self.target.clips_first:
            result = self._to_grid(self._limited(result, narrow, axis), grid, axis)
        bounds = float(np.min(low)), float(np.max(high))
        return dataclasses.replace(result, bounds=_meet(value.bounds, bounds))

    def _to_grid(self, value: Tensor, grid: tuple[str, str], axis: int | None) -> Tensor:
        along = {} if axis is None else {"axis": axis}
        codes = self.graph.node("QuantizeLinear", value.name, *grid, **along)
        real = self.graph.node("DequantizeLinear", codes, *grid, **along)
        return Tensor(real, value.order, value.repeated, value.bounds, None if along else grid)

    def _limited(
        self, value: Tensor, limits: Sequence[np.ndarray | None], axis: int | None
    ) -> Tensor:
        """Clips a tensor to limits, None for no limit."""
        name = value.name
        for operator, limit in zip(("Max", "Min"), limits, strict=True):
            if limit is not None:
                if axis is not None:
                    limit = limit.reshape([-1] + [1] * (len(value.order) - axis - 1))
                name = self.graph.node(operator, name, self.graph.constant(np.float32(limit)))
        return dataclasses.replace(value, name=name, grid=None)

    def cast(self, name: str, dtype: Any) -> str:
        """A tensor with elements of another type."""
        return self.graph.node("Cast", name, to=element_type(dtype))

    # ---- Edges

    def dilated(self, name: str, sizes: Sizes, gaps: Sequence[int], zero: str) -> str:
        """A tensor with new elements between its own.

        Args:
          name: of the tensor.
          sizes: of its axes.
          gaps: how many elements go between two, by axis.
          zero: the name of what they are.
        """
        rank = len(sizes)
        for axis, gap in enumerate(gaps):
            if gap:
                assert not isinstance(size := sizes[axis], Batch)
                name = self.graph.node("Unsqueeze", name, self.integers([axis + 1]))
                name = self.padded(name, _edges(rank + 1, axis + 1, gap), zero)
                sizes = (*sizes[:axis], size * (gap + 1), *sizes[axis + 1 :])
                name = self.padded(self.reshaped(name, sizes), _edges(rank, axis, -gap), zero)
                sizes = (*sizes[:axis], size * (gap + 1) - gap, *sizes[axis + 1 :])
        return name

    def padded(self, name: str, edges: Sequence[tuple[int, int]], value: str) -> str:
        """A tensor with more elements at its edges, or fewer.

        Args:
          name: of the tensor.
          edges: (low, high) of every axis; negative numbers cut off.
          value: the name of what is added.
        """
        if not any(map(any, edges)):
            return name
        # All axes are listed: ONNX Runtime 1.32 mixes them up where it moves transpositions.
        pads = [edge[side] for side in (0, 1) for edge in edges]
        return self.graph.node("Pad", name, self.integers(pads), value)

    # ---- Messages

    @property
    def where(self) -> str:
        """Where writing has come to."""
        return "before the first layer" if self.after is None else f"after layer {self.after!r}"


Rule = Callable[[Writer, core.JaxprEqn, Sequence[Value]], Sequence[Value]]


def result(value: Tensor, name: str, bounds: Bounds = EVERYTHING) -> Tensor:
    """A tensor with its axes as those of another one, and nothing else known of it."""
    return Tensor(name, value.order, value.repeated, bounds)


def clipped(writer: Writer, value: Tensor, bounds: Bounds) -> Tensor:
    """Clips a tensor; nothing is written for what lies within the bounds."""
    low, high = (
        limit if abs(limit) < math.inf and is_beyond else None
        for limit, is_beyond in zip(
            bounds, (value.bounds[0] < bounds[0], value.bounds[1] > bounds[1]), strict=True
        )
    )
    if low is None and high is None:
        return value
    if low == 0.0 and high is None:
        name = writer.graph.node("Relu", value.name)
    else:
        limits = ["" if x is None else writer.graph.constant(np.float32(x)) for x in (low, high)]
        name = writer.graph.node("Clip", value.name, *limits)
    return result(value, name, _meet(value.bounds, bounds))


def _edges(rank: int, axis: int, high: int) -> list[tuple[int, int]]:
    """Edges of which one is not 0."""
    return [(0, high if i == axis else 0) for i in range(rank)]


def _meet(first: Bounds, second: Bounds) -> Bounds:
    low, high = second
    return min(max(first[0], low), high), max(min(first[1], high), low)


def with_zero(bounds: Bounds) -> Bounds:
    """The bounds of values and 0."""
    return min(bounds[0], 0.0), max(bounds[1], 0.0)


def element_type(dtype: Any) -> int:
    """The ONNX type of elements of a NumPy type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
