"""Reading and evaluating jaxprs: one flat list of equations, and what each value depends on."""

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

CONTRACTIONS = ("conv_general_dilated", "dot_general")

# What only moves elements, or changes their type.
MOVEMENT = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy")

# Calls whose body may stand in place of the call, by the name of the parameter that holds it.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
}

CALLS = tuple(_INLINED)

Atom = Any  # a core.Var or a core.Literal
Env = dict[core.Var, Any]


class FlatJaxpr(NamedTuple):
    """A function as one list of equations.

    Attributes:
      equations: in order of evaluation; calls are inlined, except elementwise ones of one operand
        (activations), which keep their own differentiation rule; loops over layers are unrolled.
      params: the variables of the leaves of the first argument.
      inputs: the variables of the leaves of the second argument.
      constants: values closed over, by variable.
      outputs: one atom per output leaf.
      out_tree: the structure of the output.
      carried: what unrolled loops start with where later steps have what depends on the input.
      places: where convolutions and dot products of unrolled loops stand in the function, which is
        the same place for every step, by their results.
    """

    equations: tuple[core.JaxprEqn, ...]
    params: tuple[core.Var, ...]
    inputs: tuple[core.Var, ...]
    constants: dict[core.Var, jax.Array]
    outputs: tuple[Atom, ...]
    out_tree: Any
    carried: frozenset[core.Var]
    places: dict[core.Var, tuple[int, ...]]


def shape(atom: Atom) -> tuple[int, ...]:
    """The shape of an atom's value."""
    return tuple(atom.aval.shape)


def dtype(atom: Atom) -> Any:
    """The type of an atom's elements."""
    return atom.aval.dtype


def is_literal(atom: Atom) -> bool:
    """Whether the atom is a constant written into the equation."""
    return isinstance(atom, core.Literal)


def variables(atoms: Sequence[Atom]) -> list[core.Var]:
    """The atoms that are variables."""
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def body(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The jaxpr that an inlinable call stands for, or None for any other equation."""
    return closed(equation.params.get(_INLINED.get(equation.primitive.name, "")))


def closed(jaxpr: Any) -> Any:
    """A jaxpr with its constants; newer versions of JAX have no other. Anything else stays."""
    is_open = isinstance(jaxpr, core.Jaxpr) and not isinstance(jaxpr, core.ClosedJaxpr)
    return core.ClosedJaxpr(jaxpr, ()) if is_open else jaxpr


class ScanOperands(NamedTuple):
    """How many operands of a `lax.scan` are the same in every step, and how many it carries."""

    constant: int
    carried: int


def scan_operands(equation: core.JaxprEqn) -> ScanOperands:
    """Counts by ranks: what a step takes an element of, and adds one to, has an axis more.

    Versions of JAX name the parameters that say so differently.
    """
    inner = equation.params["jaxpr"].jaxpr

    def stacked(outside: Sequence[Atom], inside: Sequence[Atom]) -> int:
        return sum(len(shape(a)) > len(shape(b)) for a, b in zip(outside, inside, strict=True))

    carried = len(equation.outvars) - stacked(equation.outvars, inner.outvars)
    elements = stacked(equation.invars, inner.invars)
    return ScanOperands(len(equation.invars) - elements - carried, carried)


def subjaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, calls."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item := closed(item), core.ClosedJaxpr):
                yield item.jaxpr


def contains_contraction(equation: core.JaxprEqn) -> bool:
    """Whether the equation is a convolution or a dot product, or has one inside."""
    if equation.primitive.name in CONTRACTIONS:
        return True
    return any(contains_contraction(e) for jaxpr in subjaxprs(equation) for e in jaxpr.eqns)


def _is_unary_call(equation: core.JaxprEqn) -> bool:
    operands = variables(equation.invars)
    if len(operands) != 1 or len(equation.outvars) != 1:
        return False
    return shape(operands[0]) == shape(equation.outvars[0])


def is_inlined(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a call whose body stands in its place."""
    return body(equation) is not None and (
        contains_contraction(equation)
        or (equation.primitive.name != "custom_jvp_call" and not _is_unary_call(equation))
    )


def single_indices(equation: core.JaxprEqn) -> list[int]:
    """The index on every axis of which an equation keeps a single element, where it slices."""
    name, params = equation.primitive.name, equation.params
    if name == "slice":
        starts, stops = params["start_indices"], params["limit_indices"]
        sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
    elif name == "dynamic_slice":
        starts = [a.val if isinstance(a, core.Literal) else None for a in equation.invars[1:]]
        sizes = params["slice_sizes"]
    else:
        return []
    kept = zip(starts, sizes, shape(equation.invars[0]), strict=True)
    return [int(start) for start, size, full in kept if size == 1 < full and start is not None]


def bind(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as it stands."""
    params = equation.primitive.get_bind_params(equation.params)
    answer = equation.primitive.bind(*values, **params)
    return list(answer) if equation.primitive.multiple_results else [answer]


def read(env: Env, atom: Atom) -> Any:
    """The value of an atom."""
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def evaluate_equation(equation: core.JaxprEqn, env: Env) -> None:
    """Evaluates one equation as it stands, reading its operands from `env` and writing there."""
    values = [read(env, atom) for atom in equation.invars]
    env.update(zip(equation.outvars, bind(equation, values), strict=True))


class Dependence(NamedTuple):
    """What a value is computed from.

    Attributes:
      params: positions of the params leaves that reach it.
      x: whether the network's input reaches it.
      constant: whether a closed-over array reaches it.
    """

    params: frozenset[int] = frozenset()
    x: bool = False
    constant: bool = False

    def __or__(self, other: "Dependence") -> "Dependence":
        return Dependence(
            self.params | other.params, self.x or other.x, self.constant or other.constant
        )

    @property
    def params_only(self) -> bool:
        """Whether params reach the value and the input does not."""
        return bool(self.params) and not self.x


def dependences(flat: FlatJaxpr) -> dict[core.Var, Dependence]:
    """What each variable of a flat jaxpr is computed from."""
    found = {var: Dependence(frozenset([i])) for i, var in enumerate(flat.params)}
    found |= dict.fromkeys(flat.inputs, Dependence(x=True))
    found |= {var: Dependence(x=var in flat.carried, constant=True) for var in flat.constants}
    for equation in flat.equations:
        depends = depends_on(equation.invars, found)
        if not flat.carried.isdisjoint(equation.outvars):
            depends |= Dependence(x=True)
        found |= dict.fromkeys(equation.outvars, depends)
    return found


def depends_on(atoms: Sequence[Atom], found: Mapping[core.Var, Dependence]) -> Dependence:
    """The union of what the atoms are computed from."""
    return joined(
        Dependence(constant=bool(jax.numpy.shape(atom.val)))
        if is_literal(atom)
        else found.get(atom, Dependence())
        for atom in atoms
    )


def joined(depends: Iterable[Dependence]) -> Dependence:
    """The union of what several values are computed from."""
    return functools.reduce(operator.or_, depends, Dependence())


def needed(flat: FlatJaxpr) -> set[int]:
    """The positions of the equations that contribute to the outputs."""
    live = set(variables(flat.outputs))
    positions = set()
    for position in reversed(range(len(flat.equations))):
        equation = flat.equations[position]
        if live.intersection(equation.outvars):
            positions.add(position)
            live.update(variables(equation.invars))
    return positions


_RULES_OF_DIFFERENTIATION = ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd")


class Equations:
    """A run of equations as a function, equal to every other one that computes the same.

    So functions that are compiled for one network, or for one block of it, serve all others whose
    equations differ in nothing but the names of variables.

    Attributes:
      equations: in order of evaluation.
      operands: the variables that it reads, in the order of its arguments.
      results: the variables that it returns.
    """

    def __init__(
        self,
        equations: Sequence[core.JaxprEqn],
        operands: Sequence[core.Var],
        results: Sequence[core.Var],
    ) -> None:
        """Takes the attributes."""
        self.equations: Sequence[core.JaxprEqn] = equations
        self.operands: Sequence[core.Var] = operands
        self.results: Sequence[core.Var] = results
        numbers: dict[core.Var, int] = {}
        self._key = (
            _described_atoms(operands, numbers),
            _described(equations, numbers),
            _described_atoms(results, numbers),
        )

    def __call__(self, *values: Any) -> list[Any]:
        """Evaluates the equations as they stand."""
        env: Env = dict(zip(self.operands, values, strict=True))
        for equation in self.equations:
            evaluate_equation(equation, env)
        return [env[var] for var in self.results]

    def single(self, value: Any) -> Any:
        """Evaluates equations of one operand and one result."""
        [result] = self(value)
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equations) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _described(equations: Sequence[core.JaxprEqn], numbers: dict[core.Var, int]) -> tuple[Any, ...]:
    """Equations as a hashable value, their variables numbered as they come."""
    return tuple(
        (
            equation.primitive.name,
            _described_atoms(equation.invars, numbers),
            tuple(
                (name, _described_value(value))
                for name, value in sorted(equation.params.items())
                if name not in _RULES_OF_DIFFERENTIATION
            ),
            _described_atoms(equation.outvars, numbers),
        )
        for equation in equations
    )


def _described_atoms(atoms: Sequence[Atom], numbers: dict[core.Var, int]) -> tuple[Any, ...]:
    return tuple(
        ("literal", str(atom.aval), _described_value(atom.val))
        if is_literal(atom)
        else (numbers.setdefault(atom, len(numbers)), str(atom.aval))
        for atom in atoms
    )


def _described_value(value: Any) -> Any:
    """A parameter of an equation as a hashable value; one of unknown kind equals itself alone."""
    if isinstance(value := closed(value), core.ClosedJaxpr):
        inner, numbers = value.jaxpr, dict[core.Var, int]()
        variables = _described_atoms([*inner.constvars, *inner.invars], numbers)
        body = _described(inner.eqns, numbers)
        results = _described_atoms(inner.outvars, numbers)
        return variables, body, results, tuple(map(id, value.consts))
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(_described_value, value))
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    try:
        hash(value)
    except TypeError:
        return "unlike any other", id(value)
    return value
