"""Tracing a function to one flat list of equations: calls are inlined, loops over layers unrolled.

A loop with a known number of steps becomes as many copies of its body. What does not change from
step to step is computed once, so that a kernel that every step reads stays one variable.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core

from qjax.graph.jaxpr import (
    CONTRACTIONS,
    Atom,
    Dependence,
    FlatJaxpr,
    bind,
    body,
    contains_contraction,
    is_inlined,
    is_literal,
    joined,
    scan_operands,
    shape,
    subjaxprs,
    variables,
)

LIMIT = 1024  # products of all steps of a loop that is unrolled

Place = tuple[int, ...]  # of an equation: its position, after those of the calls and loops around


class Value(NamedTuple):
    """A value while a function is traced.

    Attributes:
      array: a tracer, or a number that is known.
      depends: what it is computed from.
    """

    array: Any
    depends: Dependence


def flatten(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> FlatJaxpr:
    """Traces `apply_fn(params, x)` to one flat list of equations.

    Args:
      apply_fn: a pure function of a params pytree and an input pytree.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      x: pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The flat jaxpr of `apply_fn` at these shapes.

    Raises:
      ValueError: a loop has too many steps to be unrolled.

    Examples:
      >>> def apply_fn(params, x):
      ...     return lax.scan(lambda x, w: (x @ w, None), x, params)[0]
      >>> flat = flatten(apply_fn, jnp.ones((3, 2, 2)), jnp.ones((1, 2)))
      >>> [e.primitive.name for e in flat.equations if e.primitive.name in CONTRACTIONS]
      ['dot_general', 'dot_general', 'dot_general']
    """
    nested, out_shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, x)
    count = len(jax.tree.leaves(params))
    inliner = _Inliner()

    def inlined(*leaves: Any) -> Any:
        given = [
            Value(leaf, Dependence(frozenset([i])) if i < count else Dependence(x=True))
            for i, leaf in enumerate(leaves)
        ]
        outputs = inliner.evaluate(nested, given, ())
        places = [value for _, value in inliner.products]
        return [value.array for value in outputs], inliner.carried, places

    flat, returned = jax.make_jaxpr(inlined, return_shape=True)(*nested.in_avals)
    split = np.cumsum([len(part) for part in returned])[:2]
    outputs, carried, products = (
        flat.jaxpr.outvars[start:stop] for start, stop in ((0, split[0]), split, (split[1], None))
    )
    places = [place for place, _ in inliner.products]
    return FlatJaxpr(
        equations=tuple(flat.jaxpr.eqns),
        params=tuple(flat.jaxpr.invars[:count]),
        inputs=tuple(flat.jaxpr.invars[count:]),
        constants=dict(zip(flat.jaxpr.constvars, flat.consts, strict=True)),
        outputs=tuple(outputs),
        out_tree=jax.tree.structure(out_shape),
        carried=frozenset(variables(carried)),
        places=dict(zip(variables(products), places, strict=True)),
    )


class _Inliner:
    """Evaluates a jaxpr, with the bodies of calls and loops in place of these.

    Attributes:
      carried: what a loop starts with where later steps have something that depends on the input.
      products: the results of convolutions and dot products within loops, with their places.
    """

    def __init__(self) -> None:
        """Starts outside of any loop."""
        self.carried: list[Any] = []
        self.products: list[tuple[Place, Any]] = []
        self._depth = 0
        # By place and operands; these are kept, as another object could have their identity.
        self._known: dict[Any, tuple[Any, list[Value]]] = {}

    def evaluate(
        self, closed: core.ClosedJaxpr, given: Sequence[Value], place: Place
    ) -> list[Value]:
        inner = closed.jaxpr
        env = {
            var: Value(const, _of_constant(const))
            for var, const in zip(inner.constvars, closed.consts, strict=True)
        }
        env.update(zip(inner.invars, given, strict=True))

        def read(atom: Atom) -> Value:
            return Value(atom.val, _of_constant(atom.val)) if is_literal(atom) else env[atom]

        for position, equation in enumerate(inner.eqns):
            operands = [read(atom) for atom in equation.invars]
            results = self._equation(equation, operands, (*place, position))
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def _equation(
        self, equation: core.JaxprEqn, given: list[Value], place: Place
    ) -> Sequence[Value]:
        inner = body(equation) if is_inlined(equation) else None
        if inner is not None:
            return self.evaluate(inner, given, place)
        if equation.primitive.name == "unstack":
            return [self._unstacked(equation, given, i) for i in range(len(equation.outvars))]
        if _is_unrolled(equation, given):
            return self._unrolled(equation, given, place)
        if not self._depth or equation.effects:
            return self._bound(equation, given, place)
        return self._once(place, given, lambda: self._bound(equation, given, place))

    def _unstacked(self, equation: core.JaxprEqn, given: list[Value], i: int) -> Value:
        """An element of what is iterated over: a slice, as in versions of JAX without `unstack`."""
        [stacked], axis = given, equation.params["axis"]

        def compute() -> list[Value]:
            starts, stops = [0] * jnp.ndim(stacked.array), list(jnp.shape(stacked.array))
            starts[axis], stops[axis] = i, i + 1
            kept = lax.slice(stacked.array, starts, stops, [1] * len(starts))
            return [Value(lax.squeeze(kept, [axis]), stacked.depends)]

        return self._once(("unstack", axis, i), given, compute)[0]

    def _bound(self, equation: core.JaxprEqn, given: list[Value], place: Place) -> list[Value]:
        arrays = [value.array for value in given]
        if self._depth and _is_counting(equation, arrays):
            with jax.ensure_compile_time_eval():
                results = [np.asarray(result)[()] for result in bind(equation, arrays)]
        else:
            results = bind(equation, arrays)
        if self._depth and equation.primitive.name in CONTRACTIONS:
            self.products.append((place, results[0]))
        depends = _union(given)
        return [Value(result, depends) for result in results]

    def _once(
        self, what: Any, given: Sequence[Value], compute: Callable[[], list[Value]]
    ) -> list[Value]:
        """What was computed in an earlier step of the same values."""
        key = what, tuple(id(value.array) for value in given)
        if key not in self._known:
            self._known[key] = given, compute()
        return self._known[key][1]

    def _unrolled(self, equation: core.JaxprEqn, given: list[Value], place: Place) -> list[Value]:
        """The results of a scan, step by step."""
        _check_size(equation)
        params = equation.params
        length, inner = params["length"], params["jaxpr"]
        first, carried = scan_operands(equation)
        last = first + carried
        consts, carry, stacked = given[:first], given[first:last], given[last:]
        later = _flow_of_scan(equation, [value.depends for value in given])
        carry = self._entered(carry, later[: len(carry)])
        self._depth += 1
        # All slices come first, so that the equations of every step are the same.
        elements = [[self._element(xs, i) for xs in stacked] for i in range(length)]
        steps: list[list[Value]] = [[] for _ in range(length)]
        for i in reversed(range(length)) if params["reverse"] else range(length):
            results = self.evaluate(inner, [*consts, *carry, *elements[i]], place)
            carry, steps[i] = results[: len(carry)], results[len(carry) :]
        self._depth -= 1
        stacks = [
            Value(_stack([value.array for value in column]), _union(column))
            for column in zip(*steps, strict=True)
        ]
        return [*carry, *stacks]

    def _element(self, stacked: Value, i: int) -> Value:
        def compute() -> list[Value]:
            element = lax.index_in_dim(jnp.asarray(stacked.array), i, keepdims=False)
            return [Value(element, stacked.depends)]

        return self._once(i, [stacked], compute)[0]

    def _entered(self, carry: Sequence[Value], later: Sequence[Dependence]) -> list[Value]:
        """What a loop starts with, with a variable of its own where later steps depend on x."""
        found = []
        for value, depends in zip(carry, later, strict=True):
            if depends.x and not value.depends.x and jnp.ndim(value.array):
                value = Value(jnp.copy(value.array), value.depends | Dependence(x=True))
                self.carried.append(value.array)
            found.append(value)
        return found


def _stack(arrays: Sequence[Any]) -> jax.Array:
    return lax.concatenate([lax.expand_dims(jnp.asarray(array), [0]) for array in arrays], 0)


def _of_constant(array: Any) -> Dependence:
    return Dependence(constant=bool(jnp.ndim(array)))


def _union(values: Sequence[Value]) -> Dependence:
    return joined([value.depends for value in values])


def _is_counting(equation: core.JaxprEqn, arrays: Sequence[Any]) -> bool:
    """Whether an equation computes integers of integers that are known."""
    if any(isinstance(array, Tracer) for array in arrays) or any(subjaxprs(equation)):
        return False
    atoms = [*equation.invars, *equation.outvars]
    return bool(arrays) and not any(
        shape(atom) or not (np.issubdtype(atom.aval.dtype, np.integer) or atom.aval.dtype == bool)
        for atom in atoms
    )


def _is_unrolled(equation: core.JaxprEqn, given: Sequence[Value]) -> bool:
    """Whether an equation is a loop that may hold layers."""
    is_loop = equation.primitive.name == "scan" and equation.params["length"]
    return (
        bool(is_loop)
        and contains_contraction(equation)
        and any(
            not value.depends.x and (value.depends.params or value.depends.constant)
            for value in given
        )
    )


def _products(equation: core.JaxprEqn) -> int:
    """How many convolutions and dot products an equation comes to, those of every step."""
    if equation.primitive.name in CONTRACTIONS:
        return 1
    steps = equation.params["length"] if equation.primitive.name == "scan" else 1
    return steps * sum(_products(inner) for jaxpr in subjaxprs(equation) for inner in jaxpr.eqns)


def _check_size(equation: core.JaxprEqn) -> None:
    count = _products(equation)
    if count <= LIMIT:
        return
    is_map = not scan_operands(equation).carried
    remedy = (
        "use `jax.vmap` in place of `lax.map`"
        if is_map
        else "quantize it on a shorter sequence, or the function of one step alone"
    )
    raise ValueError(
        f"a loop of {equation.params['length']:,} steps in `apply_fn` (`scan`) has {count:,} "
        f"convolutions and dot products in all, and at most {LIMIT:,} are unrolled; {remedy}."
    )


# ---- What a loop's values depend on


def _flow(closed: core.ClosedJaxpr, given: Sequence[Dependence]) -> list[Dependence]:
    """What each output of a jaxpr depends on."""
    inner = closed.jaxpr
    env = dict(zip(inner.constvars, map(_of_constant, closed.consts), strict=True))
    env.update(zip(inner.invars, given, strict=True))

    def read(atom: Atom) -> Dependence:
        return _of_constant(atom.val) if is_literal(atom) else env[atom]

    for equation in inner.eqns:
        operands = [read(atom) for atom in equation.invars]
        called = body(equation)
        if called is not None:
            results = _flow(called, operands)
        elif equation.primitive.name == "scan":
            results = _flow_of_scan(equation, operands)
        else:
            results = [joined(operands)] * len(equation.outvars)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in inner.outvars]


def _flow_of_scan(equation: core.JaxprEqn, given: Sequence[Dependence]) -> list[Dependence]:
    """What each result of a scan depends on, its carry in any step."""
    first, carried = scan_operands(equation)
    last = first + carried
    carry = list(given[first:last])
    while True:
        results = _flow(equation.params["jaxpr"], [*given[:first], *carry, *given[last:]])
        after = [a | b for a, b in zip(carry, results[: len(carry)], strict=True)]
        if after == carry:
            return [*carry, *results[len(carry) :]]
        carry = after
