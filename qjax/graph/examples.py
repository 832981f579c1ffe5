"""Which axis of what a layer reads and writes holds the examples, known by tracing one more."""

from typing import Any, NamedTuple

import jax

from qjax.graph.jaxpr import Atom, shape
from qjax.graph.layers import Network, Site


def with_one_more(x: Any) -> Any:
    """The shapes of an input of one example more.

    Args:
      x: an input, or its shapes.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] + 1, *leaf.shape[1:]), leaf.dtype), x
    )


class ExampleAxes(NamedTuple):
    """The axis of the examples in what a layer reads and writes.

    Attributes:
      input: of its input.
      output: of its output, as its operation leaves it.
      activated: of its output after the activation.
    """

    input: int
    output: int
    activated: int


def example_axes(network: Network, larger: Network) -> dict[str, ExampleAxes]:
    """Finds the axis that grows with the number of examples, for every layer.

    Args:
      network: a traced network.
      larger: the same one, traced at one more example.

    Returns:
      `ExampleAxes` by name, without the layers whose examples have no axis of their own: where
      examples are joined to another axis, say to the positions of a sequence.
    """
    found = {}
    for site, other in zip(network.first_sites, larger.first_sites, strict=True):
        pairs = zip(_values(network, site), _values(larger, other), strict=True)
        axes = [_growing_axis(*pair) for pair in pairs]
        known = [axis for axis in axes if axis is not None]
        if len(known) == len(axes):
            found[site.layer.name] = ExampleAxes(*known)
    return found


def _values(network: Network, site: Site) -> tuple[Atom, Atom, Atom]:
    output = network.flat.equations[site.chain[0]].outvars[0]
    return site.input, output, site.activated


def _growing_axis(atom: Atom, larger: Atom) -> int | None:
    """The one axis that grows by 1."""
    sizes = zip(shape(atom), shape(larger), strict=True)
    growth = [(axis, after - before) for axis, (before, after) in enumerate(sizes)]
    growing = [(axis, by) for axis, by in growth if by]
    return growing[0][0] if len(growing) == 1 and growing[0][1] == 1 else None
