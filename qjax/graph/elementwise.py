"""What elementwise equations compute, as values in NumPy's 64 bits: spelling does not count.

A value is an array where it depends on the argument, and a number where it does not.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.chain import Graph
from qjax.graph.jaxpr import MOVEMENT, Atom, shape

Shape = tuple[int, ...]
Params = dict[str, Any]

MOST_EQUATIONS = 64  # of a function that is followed


def _of_values(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *values: function(*values)


def _converted(params: Params, x: Any) -> Any:
    kind = np.dtype(params["new_dtype"])
    is_kept = jnp.issubdtype(kind, jnp.floating) or x.dtype == bool
    return x.astype(np.float64) if is_kept else None


# By the name of a primitive: its result, from its parameters and the values of its operands.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: _of_values(getattr(np, numpy_name or name))
        for name, numpy_name in {
            **dict.fromkeys(("exp", "exp2", "expm1", "log", "log1p", "tanh", "sqrt", "square")),
            **dict.fromkeys(("abs", "sign", "sin", "cos")),
            **{"add": "add", "add_any": "add", "sub": "subtract", "mul": "multiply"},
            **{"div": "divide", "pow": "power", "neg": "negative"},
            **{"max": "maximum", "min": "minimum", "ne": "not_equal", "eq": "equal"},
            **{"gt": "greater", "ge": "greater_equal", "lt": "less", "le": "less_equal"},
            **{"and": "logical_and", "or": "logical_or", "not": "logical_not"},
        }.items()
    },
    "logistic": _of_values(lambda x: 1 / (1 + np.exp(-x))),
    "rsqrt": _of_values(lambda x: 1 / np.sqrt(x)),
    "erf": _of_values(np.vectorize(math.erf, otypes=[float])),
    "erfc": _of_values(np.vectorize(math.erfc, otypes=[float])),
    "integer_pow": lambda params, x: x ** params["y"],
    "clamp": _of_values(lambda low, x, high: np.clip(x, low, high)),
    "select_n": _of_values(
        lambda which, *cases: np.where(which, *cases[::-1]) if len(cases) == 2 else None
    ),
    "copy": _of_values(lambda x: x),
    "convert_element_type": _converted,
}


class Exit(NamedTuple):
    """A value that is a function of one other value, and all that its equations lead to.

    Attributes:
      equations: that compute it, in order.
      var: the value.
      values: of the function at the arguments that were asked for, float64.
    """

    equations: tuple[core.JaxprEqn, ...]
    var: core.Var
    values: np.ndarray


def exits(graph: Graph, start: core.Var, arguments: np.ndarray) -> Iterator[Exit]:
    """Finds the functions of a value, elementwise, that are all that is read of it.

    Args:
      graph: of the network.
      start: the value.
      arguments: float64[n] that the functions are evaluated at.

    Yields:
      An `Exit` for each, the shortest first.
    """
    values: dict[core.Var, Any] = {start: arguments}
    unread = {start: set(graph.readers[start])}
    equations: list[core.JaxprEqn] = []
    while waiting := set().union(*unread.values()):
        position = min(waiting)
        if position == len(graph.equations) or len(equations) == MOST_EQUATIONS:
            return
        equation = graph.equations[position]
        operands = [_value(graph, atom, values) for atom in equation.invars]
        result = _result(equation, operands, shape(start))
        if result is None:
            return
        equations.append(equation)
        [var] = equation.outvars
        values[var], unread[var] = result, set(graph.readers[var])
        unread = {var: rest - {position} for var, rest in unread.items() if rest - {position}}
        if set(unread) <= {var} and result.dtype != bool:
            yield Exit(tuple(equations), var, result)


def evaluate(function: Callable[[jax.Array], jax.Array], arguments: np.ndarray) -> np.ndarray:
    """Evaluates an elementwise function of JAX in 64 bits, also within a trace.

    Args:
      function: made of primitives in `FUNCTIONS`.
      arguments: of any shape.

    Returns:
      float64 of that shape.

    Examples:
      >>> evaluate(jax.nn.silu, np.array([0.0, 1.0]))
      array([0.        , 0.73105858])
    """
    flat = np.ravel(np.asarray(arguments, np.float64))
    argument = jax.ShapeDtypeStruct(flat.shape, np.float32)
    found = _of_body(jax.make_jaxpr(function)(argument), [flat], flat.shape)
    assert found is not None, f"{function} has a primitive that NumPy is not told of"
    return np.broadcast_to(found, flat.shape).reshape(np.shape(arguments))


def _value(graph: Graph, atom: Any, values: dict[core.Var, Any]) -> Any:
    """The value of an atom; a number for one that depends on numbers alone, None if unknown."""
    if jaxpr.is_literal(atom):
        return _number(atom.val)
    return values[atom] if atom in values else _numbers(graph).get(atom)


_numbers_of_graphs: weakref.WeakKeyDictionary[Graph, dict[core.Var, Any]] = (
    weakref.WeakKeyDictionary()
)


def _numbers(graph: Graph) -> dict[core.Var, Any]:
    """The variables that depend on numbers alone, with their values."""
    if graph in _numbers_of_graphs:
        return _numbers_of_graphs[graph]
    numbers = {var: _number(value) for var, value in graph.constants.items()}
    found = {var: number for var, number in numbers.items() if number is not None}
    _numbers_of_graphs[graph] = found
    for equation in graph.equations:
        operands = [_value(graph, atom, {}) for atom in equation.invars]
        if operands and all(operand is not None for operand in operands):
            result = _result(equation, operands, shape(equation.outvars[0]))
            found |= {} if result is None else {equation.outvars[0]: result}
    return found


def _number(value: Any) -> Any:
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if isinstance(value, Tracer) or is_key or np.size(value) != 1:
        return None
    array = np.asarray(value).reshape(())
    return array if array.dtype == bool else array.astype(np.float64)


def _result(equation: core.JaxprEqn, operands: Sequence[Any], whole: Shape) -> Any:
    """The result of an equation, None for one that is not elementwise or of unknown operands.

    Args:
      equation: the equation.
      operands: their values.
      whole: the shape of the function's argument.
    """
    if len(equation.outvars) != 1 or any(operand is None for operand in operands):
        return None
    name, result = equation.primitive.name, equation.outvars[0]
    is_varying = any(operand.ndim for operand in operands)
    if is_varying and shape(result) != whole:
        return None
    with np.errstate(all="ignore"):
        if (inner := jaxpr.body(equation)) is not None:
            return _of_body(inner, operands, whole)
        if name in FUNCTIONS:
            return FUNCTIONS[name](equation.params, *operands)
    is_moved = name in MOVEMENT and not is_varying
    return operands[0] if is_moved and len(operands) == 1 else None


def _of_body(closed: core.ClosedJaxpr, operands: Sequence[Any], whole: Shape) -> Any:
    values = dict(zip(closed.jaxpr.constvars, map(_number, closed.consts), strict=True))
    values |= dict(zip(closed.jaxpr.invars, operands, strict=True))

    def value(atom: Atom) -> Any:
        return _number(atom.val) if jaxpr.is_literal(atom) else values[atom]

    for equation in closed.jaxpr.eqns:
        result = _result(equation, [value(atom) for atom in equation.invars], whole)
        if result is None:
            return None
        values[equation.outvars[0]] = result
    return value(closed.jaxpr.outvars[0]) if len(closed.jaxpr.outvars) == 1 else None
