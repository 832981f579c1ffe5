"""Values that flow through a network, drawn from what is known without an image.

* The output of a layer with batch norm has the mean m and the deviation d in every channel that
  `qjax.graph.batch_norm` finds: z = m + d·(e₁ + e₂)/√2. Both e have variance 1; e₁ differs from
  value to value, e₂ is the same at all positions of an example, so that what averages over
  positions still varies. Their distribution is Laplace's: real outputs have heavier tails than
  normal ones, and a range that is too narrow costs more than one that is too wide.
* An input of the network is uniform over the range that is given for it.
* What is computed from drawn values is drawn: activations, sums, pools.

All else is unknown. The numbers are pseudo-random and the same every time.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qjax.fit.streams import Segment
from qjax.graph import jaxpr
from qjax.graph.batch_norm import Statistics
from qjax.graph.layers import Network
from qjax.graph.operation import Linear, along_channels
from qjax.graph.schedule import reads

EXAMPLES = 64  # that are drawn of every value


class Draws:
    """The drawn values of a network's variables, as many as are known and still read."""

    def __init__(
        self,
        network: Network,
        leaves: Sequence[jax.Array],
        input_range: tuple[float, float] | None,
    ) -> None:
        """Draws the network's input.

        Args:
          network: the network, traced at `EXAMPLES` examples.
          leaves: the leaves of its params.
          input_range: of its inputs; None if it is unknown.
        """
        flat = network.flat
        self._fixed = flat.constants | dict(zip(flat.params, leaves, strict=True))
        self._drawn: dict[core.Var, jax.Array] = {}
        if input_range is not None:
            for index, var in enumerate(flat.inputs):
                if jnp.issubdtype(jaxpr.dtype(var), jnp.floating):
                    values = _generator(0, index).uniform(*input_range, jaxpr.shape(var))
                    self._drawn[var] = jnp.asarray(values, jaxpr.dtype(var))

    def advance(self, segment: Segment) -> None:
        """Evaluates those equations of a segment whose operands are known."""
        for equation in segment.equations:
            env: jaxpr.Env = {}
            operands = reads(equation)
            for stream in (self._fixed, self._drawn):
                env |= {var: stream[var] for var in operands if var in stream}
            if len(env) == len(set(operands)):
                jaxpr.evaluate_equation(equation, env)
                found = {var: env[var] for var in equation.outvars}
                is_drawn = any(var in self._drawn for var in operands)
                (self._drawn if is_drawn else self._fixed).update(found)
        for var in self._drawn.keys() - segment.needed:
            del self._drawn[var]

    def read(self, var: core.Var) -> jax.Array | None:
        """A variable's values with an axis of one batch, float32[1, ...]; None if unknown."""
        return self._drawn[var][None].astype(jnp.float32) if var in self._drawn else None

    def write(self, var: core.Var, values: jax.Array) -> None:
        """Sets the values of a variable, given as `read` returns them."""
        self._drawn[var] = values[0]


def draw_output(
    operation: Linear,
    statistics: Statistics,
    shape: Sequence[int],
    examples: int | None,
    seed: int,
) -> jax.Array:
    """Draws the output of a layer.

    Args:
      operation: its linear operation.
      statistics: of the output.
      shape: of the output as the operation leaves it.
      examples: the axis of its examples; None where they have no axis of their own.
      seed: differs between layers, whose outputs are independent.

    Returns:
      float32[1, *shape].
    """
    generator, ndim = _generator(1, seed), len(shape)
    kept = {axis % ndim for axis in operation.channel_axes} | {examples}
    shared = [size if axis in kept else 1 for axis, size in enumerate(shape)]
    noise = _laplace(generator, shape)
    if examples is not None:
        noise = (noise + _laplace(generator, shared)) / np.sqrt(2)
    mean, deviation = (along_channels(operation, vector, ndim) for vector in statistics)
    return (mean + deviation * jnp.asarray(noise, jnp.float32))[None]


def _laplace(generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Numbers with mean 0 and variance 1."""
    return generator.laplace(0, np.sqrt(0.5), shape)


def _generator(*seed: Any) -> np.random.Generator:
    return np.random.default_rng(seed)
