"""What follows a layer's output, recognised by what it computes: clip(x, low, high), or more."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.chain import Graph
from qjax.graph.jaxpr import MOVEMENT, Atom, Equations, dtype, shape

Bounds = tuple[float, float]


class Activation(NamedTuple):
    """What follows a layer's output, or a sum that the output is part of.

    Attributes:
      name: relu, relu6, none, or other.
      bounds: the values that it lets through unchanged; what lies outside becomes the bound.
      function: what it computes.
      is_pointwise: whether it acts on every element alone and never decreases. One of unknown form
        takes the output of a layer's operation as a whole.
    """

    name: str
    bounds: Bounds
    function: Callable[[jax.Array], jax.Array]
    is_pointwise: bool = True

    @property
    def shown(self) -> "Activation":
        """Itself, or no activation where its form is unknown."""
        return self if self.is_pointwise else NONE


def identity(x: jax.Array) -> jax.Array:
    """No activation."""
    return x


NONE = Activation("none", (-math.inf, math.inf), identity)
RELU = Activation("relu", (0.0, math.inf), jax.nn.relu)
RELU6 = Activation("relu6", (0.0, 6.0), jax.nn.relu6)
ACTIVATIONS = {activation.name: activation for activation in (NONE, RELU, RELU6)}

_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call")
_ELEMENTWISE = (
    *_CALLS,
    *(
        "max",
        "min",
        "clamp",
        "tanh",
        "logistic",
        "erf",
        "exp",
        "log1p",
        "abs",
        "sign",
        "sin",
        "cos",
    ),
    *("sqrt", "rsqrt", "square", "integer_pow", "neg"),
)


class _Computed(NamedTuple):
    """A function of one array that is known by its equations."""

    equations: Equations

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.equations.single(x)


class Found(NamedTuple):
    """Where an activation stands.

    Attributes:
      activation: what it is.
      equations: that compute it, in order.
      var: what they compute.
    """

    activation: Activation
    equations: tuple[core.JaxprEqn, ...]
    var: core.Var


def find_activation(graph: Graph, output: core.Var) -> Found:
    """Recognises what follows a value.

    Args:
      graph: of the network.
      output: a layer's output, or a sum.
    """
    bounds = NONE.bounds
    steps: list[core.JaxprEqn] = []
    clipping, activated, var = (), output, output
    while (reader := graph.only_reader(var)) is not None:
        equation = graph.equations[reader]
        result = clip_bounds(equation, {var: bounds})
        if result is None:
            if not clipping and _is_elementwise(equation, var):
                return _unknown((*steps, equation), output)
            break
        steps.append(equation)
        var = equation.outvars[0]
        if result != bounds:
            clipping, activated = tuple(steps), var
        bounds = result
    for known in ACTIVATIONS.values():
        if known.bounds == bounds:
            return Found(known, clipping, activated)
    return _unknown(clipping, output)


def _unknown(equations: tuple[core.JaxprEqn, ...], output: core.Var) -> Found:
    result = equations[-1].outvars[0]
    function = _Computed(Equations(equations, [output], [result]))
    return Found(Activation("other", NONE.bounds, function, False), equations, result)


def _is_elementwise(equation: core.JaxprEqn, var: core.Var) -> bool:
    return (
        equation.primitive.name in _ELEMENTWISE
        and jaxpr.variables(equation.invars) == [var]
        and [shape(out) for out in equation.outvars] == [shape(var)]
    )


def clip_bounds(equation: core.JaxprEqn, known: Mapping[core.Var, Any]) -> Bounds | None:
    """The (low, high) with which an equation clips the network's value, None if it does more.

    Args:
      equation: the equation to look at.
      known: what is known of its operands: a `Bounds`, or the number that a constant has.
    """

    def value(atom: Atom) -> Any:
        if jaxpr.is_literal(atom):
            return float(atom.val) if math.prod(jax.numpy.shape(atom.val)) == 1 else None
        return known.get(atom)

    name = equation.primitive.name
    operands = [value(atom) for atom in equation.invars]
    inner = jaxpr.body(equation)
    if inner is not None:
        if any(map(_rearranges, inner.jaxpr.eqns)):
            return None
        known = dict(zip(inner.jaxpr.invars, operands, strict=True))
        for inner_equation in inner.jaxpr.eqns:
            known[inner_equation.outvars[0]] = clip_bounds(inner_equation, known)
        result = inner.jaxpr.outvars[0]
        return None if jaxpr.is_literal(result) else known.get(result)
    if name in MOVEMENT:
        return operands[0]
    if name == "clamp" and isinstance(operands[1], tuple):
        low, bounds, high = operands
        return (
            None if low is None or high is None else _narrow(_narrow(bounds, max, low), min, high)
        )
    if name in ("max", "min") and len({type(operand) for operand in operands}) == 2:
        bounds, limit = sorted(operands, key=lambda operand: not isinstance(operand, tuple))
        if isinstance(bounds, tuple) and isinstance(limit, float):
            return _narrow(bounds, max if name == "max" else min, limit)
    return None


def _rearranges(equation: core.JaxprEqn) -> bool:
    """Whether an equation moves the elements of an array, or makes them integers."""
    name, result = equation.primitive.name, equation.outvars[0]
    if name in ("copy", "convert_element_type"):
        return not jax.numpy.issubdtype(dtype(result), jax.numpy.floating)
    return name in MOVEMENT and math.prod(shape(equation.invars[0])) > 1


_SELECTIONS = ("reduce_window_max", "reduce_max", "slice", "rev")


G = TypeVar("G")


def keeps_codes(equation: core.JaxprEqn, var: core.Var, high: Callable[[], float]) -> bool:
    """Whether an equation only selects or moves values of `var`, or clips them to [0, `high`].

    Args:
      equation: an equation that reads `var`.
      var: values that are multiples of one scale, up to `high`.
      high: the greatest of them; asked for only where something is clipped above.
    """
    if jaxpr.variables(equation.invars) != [var]:
        return False
    if equation.primitive.name in _SELECTIONS:
        return True
    if dtype(equation.outvars[0]) != dtype(var):
        return False
    bounds = clip_bounds(equation, {var: (-math.inf, math.inf)})
    if bounds is None or bounds[0] not in (-math.inf, 0.0):
        return False
    return bounds[1] == math.inf or bounds[1] >= high()


def follow_codes(
    equation: core.JaxprEqn, grids: dict[core.Var, G], greatest: Callable[[G], float]
) -> None:
    """Records that an equation's result lies on the same grid of codes as its operand.

    Args:
      equation: an equation between layers.
      grids: the grids of codes that values lie on; gains an entry.
      greatest: of a grid: the greatest value on it.
    """
    for var in jaxpr.variables(equation.invars):
        if var in grids and keeps_codes(equation, var, lambda var=var: greatest(grids[var])):
            grids[equation.outvars[0]] = grids[var]


def _narrow(bounds: Bounds, primitive: Callable[..., float], limit: float) -> Bounds:
    low, high = bounds
    return primitive(low, limit), primitive(high, limit)
