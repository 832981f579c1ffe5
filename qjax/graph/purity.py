"""What is no inference: random numbers, updated state, effects."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import FlatJaxpr, dtype, shape
from qjax.graph.layers import Network
from qjax.graph.naming import path_names

_RANDOM = frozenset(
    ("random_bits", "random_seed", "random_wrap", "threefry2x32", "rng_bit_generator")
)
_INSTEAD = (
    "quantize the network as it is in evaluation: for dropout and batch norm, deterministic=True "
    "or train=False, with nothing mutable"
)


def check_pure(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any, network: Network) -> None:
    """Refuses a network whose results do not depend on its params and its input alone.

    Args:
      apply_fn: the function; it is traced once more.
      params: the shapes of its params.
      x: the shapes of its input.
      network: what it was traced to.

    Raises:
      ValueError: it draws random numbers, returns its params updated, has effects, or two traces
        of it differ.
    """
    if network in _checked:
        return
    flat = network.flat
    for equation in flat.equations:
        if equation.effects:
            raise ValueError(
                f"`apply_fn` has an effect (`{equation.primitive.name}`), which a pure function "
                "has not; leave out callbacks and jax.debug.print."
            )
    live = jaxpr.needed(flat)
    for position, equation in enumerate(flat.equations):
        drawn = _RANDOM.intersection(_primitives(equation)) if position in live else ()
        if drawn:
            raise ValueError(
                f"`apply_fn` draws random numbers (`{min(drawn)}`), as dropout does; {_INSTEAD}."
            )
    for path in _updated(flat, network.paths):
        raise ValueError(
            f"`apply_fn` returns {path!r} of `params` next to its result, as a network does that "
            f"updates its state; {_INSTEAD}."
        )
    again = jaxpr.flatten(lambda *given: apply_fn(*given), params, x)
    if not _are_equal(flat, again):
        raise ValueError(
            "`apply_fn` is another function every time it is traced: it reads NumPy's random "
            f"numbers, or a state from outside. Pass what changes as `params`, or {_INSTEAD}."
        )
    _checked.add(network)


_checked: weakref.WeakSet[Network] = weakref.WeakSet()


def _primitives(equation: core.JaxprEqn) -> Iterator[str]:
    yield equation.primitive.name
    for inner in jaxpr.subjaxprs(equation):
        for other in inner.eqns:
            yield from _primitives(other)


def _updated(flat: FlatJaxpr, paths: tuple[str, ...]) -> Iterator[str]:
    """The paths of params under which there is an output of that shape and type."""
    kinds = {path: _kind(var) for path, var in zip(paths, flat.params, strict=True)}
    outputs = path_names(jax.tree.unflatten(flat.out_tree, flat.outputs))
    for name, output in zip(outputs, flat.outputs, strict=True):
        for path, kind in kinds.items():
            if name.endswith(f"/{path}") and kind == _kind(output):
                yield path


def _kind(atom: jaxpr.Atom) -> tuple[tuple[int, ...], Any]:
    return shape(atom), dtype(atom)


def _are_equal(one: FlatJaxpr, other: FlatJaxpr) -> bool:
    """Whether two traces have the same operations, literals and constants."""
    constants = [list(flat.constants.values()) for flat in (one, other)]
    return (
        len(one.equations) == len(other.equations)
        and len(constants[0]) == len(constants[1])
        and all(map(_same_operation, one.equations, other.equations))
        and all(map(_same_value, *constants))
    )


def _same_operation(one: core.JaxprEqn, other: core.JaxprEqn) -> bool:
    literals = [[a.val for a in e.invars if isinstance(a, core.Literal)] for e in (one, other)]
    return (
        one.primitive.name == other.primitive.name
        and list(map(_kind, one.outvars)) == list(map(_kind, other.outvars))
        and len(literals[0]) == len(literals[1])
        and all(map(_same_value, *literals))
    )


def _same_value(one: Any, other: Any) -> bool:
    return one is other or np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
