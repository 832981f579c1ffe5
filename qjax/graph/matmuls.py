"""Products of two activations: attention scores, probabilities times values.

Both operands depend on the network's input, so that no layer's formats hold for them. With
`Recipe.matmuls` they are sites of their own kind, `matmul`, with a grid for each operand and for
the result.
"""

import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from qjax.graph.jaxpr import shape
from qjax.graph.junctions import Branches
from qjax.graph.layers import Network, Skipped, examples_of

KIND = "matmul"


class MatrixProduct(NamedTuple):
    """`lax.dot_general` of two activations, with its static parameters; hashable.

    Attributes:
      contracting: contracted axes of (lhs, rhs).
      batch: batch axes of (lhs, rhs).
    """

    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    def apply(self, lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
        """Multiplies; `options` go to `lax.dot_general`."""
        return lax.dot_general(lhs, rhs, (self.contracting, self.batch), **options)

    def evaluate(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """Multiplies in full precision."""
        return self.apply(lhs, rhs, precision=lax.Precision.HIGHEST)

    def free(self, ranks: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of (lhs, rhs) that are neither contracted nor batch axes.

        Args:
          ranks: of the two.
        """
        taken = [{*c, *b} for c, b in zip(self.contracting, self.batch, strict=True)]
        pairs = zip(ranks, taken, strict=True)
        lhs, rhs = (tuple(a for a in range(rank) if a not in own) for rank, own in pairs)
        return lhs, rhs

    def along_result(self, side: int, vector: jax.Array, ranks: tuple[int, int]) -> jax.Array:
        """Shapes what one operand has at its batch and free axes to broadcast to the result.

        Args:
          side: 0 for lhs, 1 for rhs.
          vector: [batch axes, free axes of that side], its axes in this order.
          ranks: of the two operands.
        """
        batch, others = len(self.batch[0]), len(self.free(ranks)[1 - side])
        own = vector.shape[batch:]
        rest = (*own, *[1] * others) if side == 0 else (*[1] * others, *own)
        return vector.reshape(*vector.shape[:batch], *rest)


class Matmul(NamedTuple):
    """Where a product of two activations stands in the flat jaxpr.

    Attributes:
      name: the last layer before it and its kind, e.g. `attention/key/matmul`.
      layer: the name of that layer; empty if there is none.
      position: of its equation.
      product: the operation.
      operands: the variables that it multiplies, lhs and rhs.
      output: the variable of its result.
      shapes: of its operands and its result, for one example.
      macs: multiply-accumulate operations per example.
    """

    name: str
    layer: str
    position: int
    product: MatrixProduct
    operands: tuple[core.Var, core.Var]
    output: core.Var
    shapes: tuple[tuple[int, ...], ...]
    macs: int

    @property
    def depth(self) -> int:
        """How many products make up one element of the result."""
        size = shape(self.operands[0])
        return math.prod(size[axis] for axis in self.product.contracting[0])


def find_matmuls(network: Network) -> tuple[Matmul, ...]:
    """Finds the products of two activations of a network, in dataflow order.

    Args:
      network: a traced network.

    Examples:
      >>> import jax.numpy as jnp
      >>> from qjax.graph.layers import find_layers
      >>> params = {"query": jnp.ones((4, 4)), "key": jnp.ones((4, 4))}
      >>> def apply_fn(params, x):
      ...     return (x @ params["query"]) @ (x @ params["key"]).T
      >>> network = find_layers(apply_fn, params, jnp.ones((2, 4)))
      >>> [matmul.name for matmul in find_matmuls(network)]
      ['key/matmul']
    """
    if not network.products:
        return ()
    latest, examples = Branches(network).latest, examples_of(network.flat)
    taken = {site.layer.name for site in network.sites}
    found = []
    for position in network.products:
        equation = network.flat.equations[position]
        lhs, rhs = equation.invars
        assert isinstance(lhs, core.Var) and isinstance(rhs, core.Var)
        after = max(latest[lhs], latest[rhs])
        layer = network.sites[after].layer.name if after >= 0 else ""
        base = f"{layer or 'input'}/{KIND}"
        names = itertools.chain([base], (f"{base}@{number}" for number in itertools.count(1)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        contracting, batch = (
            (tuple(left), tuple(right)) for left, right in equation.params["dimension_numbers"]
        )
        product = MatrixProduct(contracting, batch)
        [output] = equation.outvars
        depth = math.prod(shape(lhs)[axis] for axis in contracting[0])
        macs = math.prod(shape(output)) * depth // examples
        sizes = tuple(_of_one(shape(var), examples) for var in (lhs, rhs, output))
        found.append(Matmul(name, layer, position, product, (lhs, rhs), output, sizes, macs))
    return tuple(found)


def _of_one(size: tuple[int, ...], examples: int) -> tuple[int, ...]:
    """The shape of one example; a product may have left out the axis of a single one."""
    axis = size.index(examples) if examples in size else len(size)
    return size[:axis] + size[axis + 1 :]


def left_in_float(network: Network, quantized: Collection[str]) -> tuple[Skipped, ...]:
    """What of a network stays in float where some of its matmuls do not.

    Args:
      network: a traced network.
      quantized: the names of these matmuls.
    """
    if not quantized:
        return network.skipped
    names = iter([matmul.name for matmul in find_matmuls(network)])
    return tuple(s for s in network.skipped if not (s.is_matmul and next(names) in quantized))
