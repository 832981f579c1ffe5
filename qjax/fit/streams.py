"""Two streams of values through a network, side by side, one layer at a time.

One is what the float network computes on the calibration batches, the other what the network
computes whose layers so far are quantized. Every equation is evaluated once per batch and stream,
and a value is dropped as soon as nothing reads it again.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.layers import Network, Site
from qjax.run.function import Activated, reads, schedule, segments


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of plain equations and the layer step behind it.

    Attributes:
      equations: the run.
      step: the layer step, None at the end of the network.
      needed: the variables that the step or a later one reads.
    """

    equations: tuple[core.JaxprEqn, ...]
    step: Site | Activated | None
    needed: frozenset[core.Var]


def cut(network: Network) -> tuple[Segment, ...]:
    """Cuts a network's schedule into segments."""
    found = []
    needed = frozenset(jaxpr.variables(network.flat.outputs))
    for equations, step in reversed(list(segments(schedule(network)))):
        needed |= frozenset(reads(step)) if step else frozenset()
        found.append(Segment(equations, step, needed))
        needed |= frozenset(var for equation in equations for var in reads(equation))
    return tuple(reversed(found))


class Streams:
    """The live values of the float and of the quantized network on every calibration batch."""

    def __init__(
        self,
        network: Network,
        leaves: Sequence[jax.Array],
        batches: Iterable[Sequence[jax.Array]],
        is_sequential: bool,
    ) -> None:
        """Starts both streams at the network's input.

        Args:
          network: the network, traced at the size of the batches.
          leaves: the leaves of its params.
          batches: for each batch, the leaves of an input.
          is_sequential: whether there is a quantized stream; otherwise it is the float one.
        """
        flat = network.flat
        self._fixed = flat.constants | dict(zip(flat.params, leaves, strict=True))
        self._floats = [dict(zip(flat.inputs, batch, strict=True)) for batch in batches]
        self._quantized = [dict(env) for env in self._floats] if is_sequential else self._floats
        self._streams = [self._floats, self._quantized] if is_sequential else [self._floats]

    def advance(self, segment: Segment) -> None:
        """Evaluates the equations of a segment on every batch."""
        read = {var for equation in segment.equations for var in reads(equation)}
        written = {var for equation in segment.equations for var in equation.outvars}
        fixed = {var: self._fixed[var] for var in read if var in self._fixed}
        operands = [var for var in read - written if var not in fixed]
        results = [var for var in written if var in segment.needed]

        @jax.jit
        def evaluate(values: list[jax.Array], constants: list[jax.Array]) -> list[jax.Array]:
            env = dict(zip(operands, values, strict=True))
            env.update(zip(fixed, constants, strict=True))
            for equation in segment.equations:
                jaxpr.evaluate_equation(equation, env)
            return [env[var] for var in results]

        for stream in self._streams:
            for env in stream:
                values = evaluate([env[var] for var in operands], list(fixed.values()))
                for var in env.keys() - segment.needed:
                    del env[var]
                env.update(zip(results, values, strict=True))

    def read(self, var: core.Var) -> tuple[list[jax.Array], list[jax.Array]]:
        """A variable's values on every batch in the float and in the quantized stream."""
        values = [
            [self._fixed[var] if var in self._fixed else env[var] for env in stream]
            for stream in (self._floats, self._quantized)
        ]
        return values[0], values[1]

    def holds(self, var: core.Var) -> bool:
        """Whether the variable has a value on every batch by now."""
        return var in self._fixed or var in self._floats[0]

    def write(
        self, var: core.Var, floats: Sequence[jax.Array], quantized: Sequence[jax.Array]
    ) -> None:
        """Sets a variable on every batch; without a quantized stream only to its float values."""
        for stream, values in zip(self._streams, (floats, quantized), strict=False):
            for env, value in zip(stream, values, strict=True):
                env[var] = value
