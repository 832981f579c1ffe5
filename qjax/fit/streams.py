"""Two streams of values through a network, side by side, one layer at a time.

One is what the float network computes on the calibration batches, the other what the network
computes whose layers so far are quantized. The values of all batches are stacked, [batches,
examples, ...], and a value is dropped as soon as nothing reads it again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import Equations
from qjax.graph.junctions import Junction
from qjax.graph.layers import Network
from qjax.graph.matmuls import Matmul
from qjax.graph.schedule import SpecialStep, reads, schedule, segments
from qjax.programs import program


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of plain equations and the step of another kind after it.

    Attributes:
      equations: the run.
      step: that step, None at the end of the network.
      needed: the variables that the step or a later one reads.
    """

    equations: tuple[core.JaxprEqn, ...]
    step: SpecialStep | None
    needed: frozenset[core.Var]


def cut(
    network: Network, junctions: Sequence[Junction] = (), matmuls: Sequence[Matmul] = ()
) -> tuple[Segment, ...]:
    """Cuts a network's schedule into segments; see `schedule`."""
    found = []
    needed = frozenset(jaxpr.variables(network.flat.outputs))
    for equations, step in reversed(list(segments(schedule(network, junctions, matmuls)))):
        needed |= frozenset(reads(step)) if step else frozenset()
        found.append(Segment(equations, step, needed))
        needed |= frozenset(var for equation in equations for var in reads(equation))
    return tuple(reversed(found))


def of_segment(segment: Segment) -> tuple[list[core.Var], list[core.Var]]:
    """The variables that the equations of a segment read, and those that are read of them."""
    written = {var for equation in segment.equations for var in equation.outvars}
    read = dict.fromkeys(var for equation in segment.equations for var in reads(equation))
    results = [var for var in written if var in segment.needed]
    results.sort(key=[v for e in segment.equations for v in e.outvars].index)
    return [var for var in read if var not in written], results


Rounding = Callable[[jax.Array], jax.Array]


def fixed_values(
    network: Network,
    leaves: Sequence[jax.Array],
    tables: Mapping[core.Var, jax.Array],
    is_sequential: bool,
) -> list[dict[core.Var, Any]]:
    """What does not depend on the input, in the float and in the quantized stream.

    Args:
      network: the network.
      leaves: the leaves of its params.
      tables: what quantized tables hold, by their variables.
      is_sequential: whether there is a quantized stream.
    """
    fixed = network.flat.constants | dict(zip(network.flat.params, leaves, strict=True))
    return [fixed, {**fixed, **tables}] if is_sequential else [fixed]


class Streams:
    """The live values of the float and of the quantized network on all calibration batches."""

    def __init__(
        self, fixed: Sequence[dict[core.Var, Any]], inputs: Mapping[core.Var, jax.Array]
    ) -> None:
        """Starts the streams at the network's input.

        Args:
          fixed: what does not depend on the input, by stream; see `fixed_values`.
          inputs: the leaves of an input, those of all batches stacked.
        """
        self._start(fixed, [dict(inputs) for _ in fixed], len(next(iter(inputs.values()))))

    def _start(
        self,
        fixed: Sequence[dict[core.Var, Any]],
        streams: Sequence[dict[core.Var, jax.Array]],
        count: int,
    ) -> None:
        self._fixed, self._streams, self._count = list(fixed), list(streams), count
        self._floats, self._quantized = self._streams[0], self._streams[-1]

    @classmethod
    def of_values(
        cls,
        fixed: Sequence[dict[core.Var, Any]],
        streams: Sequence[dict[core.Var, Any]],
        count: int,
    ) -> "Streams":
        """Streams in the midst of a network.

        Args:
          fixed: what does not depend on the input, by stream.
          streams: the values of the float stream, and of the quantized one if there is one.
          count: of batches.
        """
        found = cls.__new__(cls)
        found._start([dict(each) for each in fixed], [dict(each) for each in streams], count)
        return found

    def on_device(self) -> "Streams":
        """The same values; what happens to one does not change the other."""
        return Streams.of_values(self._fixed, self._streams, self._count)

    def of_shapes(self) -> "Streams":
        """Streams of shapes, for what is only to be compiled."""
        shapes = [
            {var: jax.ShapeDtypeStruct(value.shape, value.dtype) for var, value in stream.items()}
            for stream in self._streams
        ]
        return Streams.of_values(self._fixed, shapes, self._count)

    @property
    def is_on_default_device(self) -> bool:
        """Whether nobody has placed the values on other devices than the default one."""
        values = (value for stream in self._streams for value in stream.values())
        return not any(isinstance(value, jax.Array) and value.committed for value in values)

    def advance(self, segment: Segment) -> None:
        """Evaluates the equations of a segment on every batch."""
        if segment.equations:
            self._evaluate(segment)
        for stream in self._streams:
            for var in stream.keys() - segment.needed:
                del stream[var]

    def pass_over(self, segment: Segment) -> None:
        """Evaluates of a segment what params alone lead to: all else will be restored."""
        operands = {var for equation in segment.equations for var in reads(equation)}
        written = {var for equation in segment.equations for var in equation.outvars}
        if segment.equations and operands - written <= self._fixed[0].keys():
            self._evaluate(segment)

    @property
    def values(self) -> tuple[dict[core.Var, jax.Array], dict[core.Var, jax.Array]]:
        """The live values of the float and of the quantized stream, which may be the same."""
        return self._floats, self._quantized

    def restore(self, floats: dict[core.Var, Any], quantized: dict[core.Var, Any]) -> None:
        """Sets the live values of both streams."""
        for stream, values in zip(self._streams, (floats, quantized), strict=False):
            stream.clear()
            stream.update(values)

    def _evaluate(self, segment: Segment) -> None:
        operands, results = of_segment(segment)
        function = Equations(segment.equations, operands, results)
        is_stacked = tuple(var not in self._fixed[0] for var in operands)
        at_once = not any(map(_goes_batch_by_batch, segment.equations))
        before: list[Any] = []
        for fixed, stream in zip(self._fixed, self._streams, strict=True):
            values = [fixed[v] if v in fixed else stream[v] for v in operands]
            if before and all(a is b for a, b in zip(values, before[0], strict=True)):
                found = before[1]  # nothing that it reads is quantized yet
            elif not any(is_stacked):
                found = _evaluate_once(function, *values)
            else:
                found = _evaluate_stacked(function, is_stacked, at_once, *values)
            before = [values, found]
            values_of = zip(results, found, strict=True)
            (stream if any(is_stacked) else fixed).update(values_of)

    def read(self, var: core.Var) -> tuple[jax.Array, jax.Array]:
        """A variable's values on all batches in the float and in the quantized stream."""
        if var in self._fixed[0]:  # what a loop starts with
            floats, values = (self._fixed[number][var] for number in (0, -1))
            return _repeated(floats, self._count), _repeated(values, self._count)
        return self._floats[var], self._quantized[var]

    def stored(self, var: core.Var) -> tuple[jax.Array, jax.Array]:
        """The same, to be read batch by batch."""
        return self.read(var)

    def holds(self, var: core.Var) -> bool:
        """Whether the variable has a value on every batch by now."""
        return var in self._floats

    def write(self, var: core.Var, floats: jax.Array, quantized: jax.Array) -> None:
        """Sets a variable on all batches; without a quantized stream only to its float values."""
        for stream, values in zip(self._streams, (floats, quantized), strict=False):
            stream[var] = values

    def apply(
        self,
        var: core.Var,
        on_floats: Callable[..., jax.Array],
        on_values: Callable[..., jax.Array],
        *of: core.Var,
    ) -> None:
        """Sets a variable to functions of others.

        Args:
          var: the variable.
          on_floats: of the stacked values of the others in the float stream.
          on_values: of those in the quantized stream.
          of: the others.
        """
        floats, values = zip(*map(self.read, of), strict=True)
        self.write(var, on_floats(*floats), on_values(*values))

    def round(
        self, var: core.Var, rounding: Rounding, floats: jax.Array, values: jax.Array
    ) -> None:
        """Sets a variable of the quantized stream to its rounded values.

        Args:
          var: the variable.
          rounding: what rounds them, for values that are computed later.
          floats: its values in the float stream.
          values: the rounded ones.
        """
        del rounding
        self.write(var, floats, values)


def _goes_batch_by_batch(equation: core.JaxprEqn) -> bool:
    """Whether an equation may not take all batches at once: products take memory.

    The product of groups has no rule for `jax.vmap`.
    """
    is_grouped = equation.primitive.name == "ragged_dot_general"
    return is_grouped or jaxpr.contains_contraction(equation)


@program(static_argnums=1)
def _repeated(values: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(values, (count, *values.shape))


@program(static_argnums=0)
def _evaluate_once(function: Equations, *values: jax.Array) -> list[jax.Array]:
    return function(*values)


@program(static_argnums=(0, 1, 2))
def _evaluate_stacked(
    function: Equations, is_stacked: tuple[bool, ...], at_once: bool, *values: jax.Array
) -> list[jax.Array]:
    if at_once:
        return jax.vmap(function, [0 if stacked else None for stacked in is_stacked])(*values)
    stacked = [value for value, is_own in zip(values, is_stacked, strict=True) if is_own]

    def evaluate(own: list[jax.Array]) -> list[jax.Array]:
        rest = iter(own)
        batch = [
            next(rest) if is_own else value
            for value, is_own in zip(values, is_stacked, strict=True)
        ]
        return function(*batch)

    return map_batches(evaluate, stacked)


def cast(values: jax.Array, dtype: Any) -> jax.Array:
    """Values of another type."""
    return values if values.dtype == dtype else _cast(values, dtype)


@program(static_argnums=1)
def _cast(values: jax.Array, dtype: Any) -> jax.Array:
    return values.astype(dtype)


def map_batches(function: Callable[[Any], Any], batches: Any) -> Any:
    """Evaluates a function on one batch after the other, of values that are stacked.

    Args:
      function: of the values of one batch, a pytree.
      batches: the same pytree, leaves [batches, ...].

    Returns:
      What the function returns, stacked.
    """
    if len(jax.tree.leaves(batches)[0]) > 1:
        return lax.map(function, batches)
    found = function(jax.tree.map(lambda leaf: leaf[0], batches))
    return jax.tree.map(lambda leaf: leaf[None], found)
