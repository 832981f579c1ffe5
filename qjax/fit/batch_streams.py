"""The two streams of values of `qjax.fit.streams`, kept in a store and read a batch at a time."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit.memory import Store, Stored
from qjax.fit.streams import Rounding, Segment, Streams, of_segment
from qjax.graph.jaxpr import Equations
from qjax.programs import program


class BatchStreams:
    """The live values of the float and of the quantized network, in a store."""

    def __init__(
        self,
        fixed: Sequence[dict[core.Var, Any]],
        inputs: Mapping[core.Var, Stored],
        store: Store,
    ) -> None:
        """Starts the streams at the network's input; see `Streams`.

        Args:
          fixed: what does not depend on the input, by stream.
          inputs: the leaves of an input.
          store: where values are kept.
        """
        self.store = store
        self._fixed, self._streams = list(fixed), [dict(inputs) for _ in fixed]
        self._floats, self._quantized = self._streams[0], self._streams[-1]
        self._count = len(next(iter(inputs.values())))

    def on_device(self) -> Streams:
        """The same values, those of all batches stacked on the device."""
        stacked: dict[int, jax.Array] = {}

        def of(values: dict[core.Var, Stored]) -> dict[core.Var, jax.Array]:
            for value in values.values():
                if id(value) not in stacked:
                    stacked[id(value)] = self._whole(value)
            return {var: stacked[id(value)] for var, value in values.items()}

        return Streams.of_values(self._fixed, [of(values) for values in self._streams], self._count)

    def advance(self, segment: Segment) -> None:
        """Evaluates the equations of a segment on every batch."""
        if segment.equations:
            self._evaluate(segment)
        for stream in self._streams:
            for var in stream.keys() - segment.needed:
                del stream[var]

    def _evaluate(self, segment: Segment) -> None:
        operands, results = of_segment(segment)
        function = Equations(segment.equations, operands, results)
        read = [var for var in operands if var not in self._fixed[0]]
        before: list[Any] = []
        for own, stream in zip(self._fixed, self._streams, strict=True):
            fixed = [own[var] if var in own else None for var in operands]
            values = [stream[var] for var in read]
            given = [*fixed, *values]
            if before and all(a is b for a, b in zip(given, before[0], strict=True)):
                found = before[1]  # nothing that it reads is quantized yet
            elif read:
                found = self.store(partial(_evaluate, function, fixed), values, len(results))
            else:
                found = _evaluate(function, fixed)
            before = [given, found]
            (stream if read else own).update(zip(results, found, strict=True))

    def holds(self, var: core.Var) -> bool:
        """Whether the variable has a value on every batch by now."""
        return var in self._floats

    def read(self, var: core.Var) -> tuple[jax.Array, jax.Array]:
        """A variable's values on all batches, stacked, in the float and the quantized stream."""
        floats, quantized = self.stored(var)
        whole = self._whole(floats)
        return whole, whole if quantized is floats else self._whole(quantized)

    def stored(self, var: core.Var) -> tuple[Stored, Stored]:
        """A variable's values in the float and in the quantized stream, to be read by batch."""
        if var in self._fixed[0]:  # what a loop starts with
            floats, values = (jnp.asarray(self._fixed[number][var]) for number in (0, -1))
            return [floats] * self._count, [values] * self._count
        return self._floats[var], self._quantized[var]

    def _whole(self, value: Stored) -> jax.Array:
        return jnp.stack([value[number] for number in range(self._count)])

    def put(self, var: core.Var, floats: Stored, quantized: Stored) -> None:
        """Sets a variable; without a quantized stream only to its float values."""
        for stream, value in zip(self._streams, (floats, quantized), strict=False):
            stream[var] = value

    def apply(
        self,
        var: core.Var,
        on_floats: Callable[..., jax.Array],
        on_values: Callable[..., jax.Array],
        *of: core.Var,
    ) -> None:
        """Sets a variable to functions of others; see `Streams.apply`."""
        operands = zip(*map(self.stored, of), strict=True)
        functions = on_floats, on_values
        for stream, function, values in zip(self._streams, functions, operands, strict=False):
            [stream[var]] = self.store(partial(_single, function), values, 1)

    def round(self, var: core.Var, rounding: Rounding, _floats: Any, _values: Any) -> None:
        """Sets a variable of the quantized stream to its rounded values; see `Streams.round`."""
        if len(self._streams) > 1:
            function = partial(_single, rounding)
            [self._quantized[var]] = self.store(function, [self._quantized[var]], 1)


def _single(function: Callable[..., Any], *values: jax.Array) -> list[jax.Array]:
    """A function of stacked batches, of one batch."""
    return [function(*(value[None] for value in values))[0]]


@program(static_argnums=0)
def _filled(function: Equations, fixed: Sequence[Any], values: Sequence[Any]) -> list[jax.Array]:
    rest = iter(values)
    return function(*(next(rest) if value is None else value for value in fixed))


def _evaluate(function: Equations, fixed: Sequence[Any], *values: jax.Array) -> list[jax.Array]:
    return _filled(function, fixed, values)
