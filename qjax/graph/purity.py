"""What is no inference: random numbers, updated state, effects, examples that are mixed."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.activation import with_clips
from qjax.graph.examples import with_one_more
from qjax.graph.fingerprint import fingerprint
from qjax.graph.flatten import flatten
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
      ValueError: it draws random numbers, returns its params updated, has effects, two traces of
        it differ, or a layer reads what is reduced over the examples of a batch.
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
    position = _reduced_examples(network)
    if position is not None and _grows(apply_fn, params, x, flat, position):
        raise ValueError(
            "`apply_fn` mixes the examples of a batch: a layer reads what "
            f"`{flat.equations[position].primitive.name}` makes of all of them, as batch norm does "
            f"in training; {_INSTEAD}."
        )
    again = with_clips(flatten(lambda *given: apply_fn(*given), params, x))
    if fingerprint(flat) != fingerprint(again):
        raise ValueError(
            "`apply_fn` is another function every time it is traced: it reads NumPy's random "
            f"numbers, or a state from outside. Pass what changes as `params`, or {_INSTEAD}."
        )
    _checked.add(network)


_checked: weakref.WeakSet[Network] = weakref.WeakSet()


def _reduced_examples(network: Network) -> int | None:
    """The position of the first reduction over what may be examples that a layer depends on.

    Sums of integers are left out: they count, as routers do that tell `ragged_dot` its groups.
    """
    flat = network.flat
    sizes = {shape(var)[0] for var in flat.inputs if shape(var)}
    inputs = {site.input for site in network.sites}
    reductions = [
        (position, operands)
        for position, equation in enumerate(flat.equations)
        if 0 in equation.params.get("axes", ())
        and (operands := jaxpr.variables(equation.invars))
        and shape(operands[0])[0] in sizes
        and jnp.issubdtype(dtype(operands[0]), jnp.floating)
    ]
    if not reductions:
        return None
    found = jaxpr.dependences(flat)
    starts = {at for at, operands in reductions if jaxpr.depends_on(operands, found).x}
    after: dict[core.Var, int] = {}
    for position, equation in enumerate(flat.equations):
        known = [after[var] for var in jaxpr.variables(equation.invars) if var in after]
        known += [position] if position in starts else []
        if known:
            after |= dict.fromkeys(equation.outvars, min(known))
    return min((after[var] for var in inputs & after.keys()), default=None)


def _grows(
    apply_fn: Callable[[Any, Any], Any], params: Any, x: Any, flat: FlatJaxpr, position: int
) -> bool:
    """Whether the first axis of what an equation reads holds the examples: it grows with them."""
    larger = with_clips(flatten(apply_fn, params, with_one_more(x))).equations
    if len(larger) != len(flat.equations):
        return False
    before, after = (shape(found[position].invars[0])[0] for found in (flat.equations, larger))
    return after == before + 1


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
