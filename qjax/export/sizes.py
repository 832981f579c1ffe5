"""The sizes of a network's arrays for every number of examples, known by tracing two numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import FlatJaxpr, shape

TRACED = (2, 3)  # numbers of examples: no axis of one example is taken for one that broadcasts


class Batch(NamedTuple):
    """The size of an axis that grows with the number of examples.

    Attributes:
      times: its size for one example.

    Examples:
      >>> print(Batch(1), Batch(4))
      batch 4*batch
    """

    times: int

    def __str__(self) -> str:
        return "batch" if self.times == 1 else f"{self.times}*batch"


Size = int | Batch
Sizes = tuple[Size, ...]


def with_batch(x: Any, size: int) -> Any:
    """The shapes of an input of so many examples.

    Args:
      x: a pytree of arrays or shapes with a leading axis of examples.
      size: the number of examples.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:])[: len(leaf.shape)], leaf.dtype), x
    )


def sizes_by_variable(flat: FlatJaxpr, larger: FlatJaxpr) -> dict[core.Var, Sizes]:
    """The sizes of every variable, those in the bodies of calls too.

    Args:
      flat: a network traced at `TRACED[0]` examples.
      larger: the same one at `TRACED[1]`.

    Raises:
      ValueError: the two compute different things.
    """
    found: dict[core.Var, Sizes] = {}
    own, other = ((*f.params, *f.inputs, *f.constants) for f in (flat, larger))
    _compare_atoms(own, other, found)
    _compare(flat.equations, larger.equations, found)
    _compare_atoms(flat.outputs, larger.outputs, found)
    return found


def _compare(
    equations: Sequence[core.JaxprEqn],
    others: Sequence[core.JaxprEqn],
    found: dict[core.Var, Sizes],
) -> None:
    if [e.primitive for e in equations] != [e.primitive for e in others]:
        raise _depends_on_batch("takes other steps")
    for equation, other in zip(equations, others, strict=True):
        _compare_atoms(equation.invars, other.invars, found)
        inner, other_inner = jaxpr.body(equation), jaxpr.body(other)
        if inner is not None and other_inner is not None:
            own, theirs = inner.jaxpr, other_inner.jaxpr
            variables = (*own.constvars, *own.invars), (*theirs.constvars, *theirs.invars)
            _compare_atoms(*variables, found)
            _compare(own.eqns, theirs.eqns, found)
        _compare_atoms(equation.outvars, other.outvars, found)


def _compare_atoms(
    atoms: Sequence[Any], others: Sequence[Any], found: dict[core.Var, Sizes]
) -> None:
    for atom, other in zip(atoms, others, strict=True):
        if jaxpr.is_literal(atom):
            if not jaxpr.is_literal(other) or _bytes(atom) != _bytes(other):
                raise _depends_on_batch(f"uses the constant {atom.val} in the first one")
        else:
            found[atom] = _sizes(shape(atom), shape(other))


def _sizes(own: Sequence[int], other: Sequence[int]) -> Sizes:
    if len(own) != len(other):
        raise _depends_on_batch("makes an array of another rank")
    few, more = TRACED
    sizes: list[Size] = []
    for size, larger in zip(own, other, strict=True):
        times, rest = divmod(larger - size, more - few)
        if rest or (times and times * few != size):
            raise _depends_on_batch(f"makes axes of {size} and {larger}")
        sizes.append(Batch(times) if times else size)
    return tuple(sizes)


def _depends_on_batch(what: str) -> ValueError:
    return ValueError(
        f"`apply_fn` must do the same for every number of examples; with {TRACED[0]} and "
        f"{TRACED[1]} of them it {what}. Let nothing but the leading axis depend on their number."
    )


def _bytes(literal: Any) -> bytes:
    return np.asarray(literal.val).tobytes()
