"""What follows a layer's output, recognised by what it computes: clip(x, low, high), or more."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.extend import core

from qjax.graph import elementwise, jaxpr
from qjax.graph.chain import Graph
from qjax.graph.jaxpr import MOVEMENT, Atom, Equations, FlatJaxpr, dtype, shape

Bounds = tuple[float, float]


class Activation(NamedTuple):
    """What follows a layer's output, or a sum that the output is part of.

    Attributes:
      name: in `ACTIVATIONS`, or other.
      bounds: the values that it lets through unchanged; what lies outside becomes the bound.
      function: what it computes.
      is_pointwise: whether it acts on every element alone. One of unknown form takes the output of
        a layer's operation as a whole.
      is_clip: whether it is clip(x, *bounds), so that its value is one that the output may have.
    """

    name: str
    bounds: Bounds
    function: Callable[[jax.Array], jax.Array]
    is_pointwise: bool = True
    is_clip: bool = False

    @property
    def shown(self) -> "Activation":
        """Itself, or no activation where its form is unknown."""
        return self if self.is_pointwise else NONE

    @property
    def clip(self) -> "Activation":
        """Itself, or no activation where it does more than to clip."""
        return self if self.is_clip else NONE


class LeakyRelu(NamedTuple):
    """x where that is positive, and slope · x where it is not."""

    slope: float = 0.01

    def __call__(self, x: jax.Array) -> jax.Array:
        """Its value."""
        return jax.nn.leaky_relu(x, self.slope)


def identity(x: jax.Array) -> jax.Array:
    """No activation."""
    return x


def gelu(x: jax.Array) -> jax.Array:
    """X · Φ(x), Φ being the distribution of a standard normal variable."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """X · σ(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


EVERYTHING = (-math.inf, math.inf)
NONE = Activation("none", EVERYTHING, identity, is_clip=True)
RELU = Activation("relu", (0.0, math.inf), jax.nn.relu, is_clip=True)
RELU6 = Activation("relu6", (0.0, 6.0), jax.nn.relu6, is_clip=True)
_CLIPS = (NONE, RELU, RELU6)
_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": jax.nn.elu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "leaky_relu": LeakyRelu(),
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jax.numpy.tanh,
}
ACTIVATIONS = {
    **{clip.name: clip for clip in _CLIPS},
    **{name: Activation(name, EVERYTHING, function) for name, function in _FUNCTIONS.items()},
}

# What functions are told apart by: their values here.
_ARGUMENTS = np.concatenate([np.linspace(-12.0, 12.0, 97), [-30.0, -0.01, 0.01, 30.0]])
_TOLERANCE = 4  # of a value, times the precision of its type, relative to 1 + |argument|

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
    bounds = EVERYTHING
    steps: list[core.JaxprEqn] = []
    clipping, activated, var = (), output, output
    unknown: Found | None = None
    while (reader := graph.only_reader(var)) is not None:
        equation = graph.equations[reader]
        result = clip_bounds(equation, {var: bounds})
        if result is None:
            if not clipping and _is_elementwise(equation, var):
                unknown = _unknown((*steps, equation), output)
            break
        steps.append(equation)
        var = equation.outvars[0]
        if result != bounds:
            clipping, activated = tuple(steps), var
        bounds = result
    for known in _CLIPS:
        if clipping and known.bounds == bounds:
            return Found(known, clipping, activated)
    start, before = (output, ()) if clipping else (var, tuple(steps))
    if (found := _recognised(graph, start)) is not None:
        return found._replace(equations=(*before, *found.equations))
    if clipping:
        return _unknown(clipping, output)
    return unknown or Found(NONE, (), output)


def _recognised(graph: Graph, start: core.Var) -> Found | None:
    """The longest known function of a value that is all that is read of it."""
    found = None
    if not jax.numpy.issubdtype(dtype(start), jax.numpy.floating):
        return None
    for equations, var, values in elementwise.exits(graph, start, _ARGUMENTS):
        if jax.numpy.issubdtype(dtype(var), jax.numpy.floating):
            known = _known(values, _precision(dtype(start)))
            found = found if known is None else Found(known, equations, var)
    return found


def _precision(kind: Any) -> float:
    """Of what is computed in a type; the activations that we know are written in float32."""
    return max(float(jax.numpy.finfo(t).eps) for t in (kind, jax.numpy.float32))


def _known(values: np.ndarray, precision: float) -> Activation | None:
    """The activation of these values at the arguments, if there is one."""
    slope = -float(values[_ARGUMENTS == -1.0][0])
    leaky = ACTIVATIONS["leaky_relu"]._replace(function=LeakyRelu(slope))
    candidates = [*ACTIVATIONS.values(), *([leaky] if 0 < slope < 1 else [])]

    def distance(activation: Activation) -> float:
        error = np.abs(values - _values_of(activation.function))
        return float(np.max(error / (1 + np.abs(_ARGUMENTS))))

    least = min(candidates, key=distance)
    allowed = 0.0 if least.is_clip else _TOLERANCE * precision
    return least if least != NONE and distance(least) <= allowed else None


@functools.lru_cache(64)
def _values_of(function: Callable[[jax.Array], jax.Array]) -> np.ndarray:
    return elementwise.evaluate(function, _ARGUMENTS)


_COMPARISONS = ("gt", "ge", "lt", "le")


def with_clips(flat: FlatJaxpr) -> FlatJaxpr:
    """Puts a relu where comparisons and selections amount to one, as in where(x > 0, x, 0).

    So it is folded into a clamp of codes, and exported, as any other relu.

    Args:
      flat: a network.
    """
    graph, clips = Graph(flat), {}
    for position in sorted(jaxpr.needed(flat)):
        equation = flat.equations[position]
        if equation.primitive.name in _COMPARISONS:
            for start in jaxpr.variables(equation.invars):
                found = _recognised(graph, start)
                if found is None or not found.activation.is_clip:
                    continue
                if dtype(found.var) == dtype(start):
                    clips[found.var] = start, found.activation.function

    def rewritten(equation: core.JaxprEqn) -> core.JaxprEqn:
        if clips.keys().isdisjoint(equation.outvars):
            return equation
        [result] = equation.outvars
        start, clip = clips[result]
        [whole] = jax.make_jaxpr(clip)(start.aval).jaxpr.eqns
        return whole.replace(invars=[start], outvars=[result])

    return flat._replace(equations=tuple(map(rewritten, flat.equations)))


def _unknown(equations: tuple[core.JaxprEqn, ...], output: core.Var) -> Found:
    result = equations[-1].outvars[0]
    function = _Computed(Equations(equations, [output], [result]))
    return Found(Activation("other", EVERYTHING, function, False), equations, result)


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
