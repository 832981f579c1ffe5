"""Finding the layers of a network in its jaxpr.

A layer is a convolution or a dot product of something that depends on params only (its kernel) and
something that depends on the input, together with the chain of per-channel affine operations behind
it (bias, batch norm), up to its pre-activation output.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import Atom, FlatJaxpr, dtype, shape
from qjax.graph.operation import Linear, linear_operation

Activation = Literal["none", "relu", "relu6", "other"]

_AFFINE = ("add", "sub", "mul", "div")
_MOVEMENT = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy")
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
_REMEDY = {
    "scan": "write the loop as a Python loop over layers with their own parameters",
    "while": "write the loop as a Python loop (its length must not depend on the data)",
    "cond": "choose the branch in Python, outside of the traced function",
    "custom_vjp_call": "call the function without its custom_vjp rule for inference",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, described statically.

    Attributes:
      name: where its kernel lives in params, e.g. `layer1/block0/conv1`.
      kind: conv, depthwise_conv, grouped_conv, dense or grouped_dense.
      activation: what follows its output: relu, relu6, other, or none.
      kernel_shape: shape of the kernel as the operation sees it.
      input_shape: shape of its input, batch included.
      output_shape: shape of its output, batch included.
      macs: multiply-accumulate operations per example.
      operation: the linear operation with its static parameters.
    """

    name: str
    kind: str
    activation: Activation
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    operation: Linear


class Affine(NamedTuple):
    """One operation of the chain behind a layer: `primitive(y, operand)`, or reversed.

    Attributes:
      primitive: add, sub, mul or div.
      operand: the atom, depending on params only, that y is combined with.
      axes: where the axes of `operand` lie among those of y (its other axes are shared).
      channel_axes: where the layer's channel axes lie in y at this point.
      ndim: the rank of y at this point.
      is_reversed: whether y is the second operand.
    """

    primitive: str
    operand: Atom
    axes: tuple[int, ...]
    channel_axes: tuple[int, ...]
    ndim: int
    is_reversed: bool


class Shortcut(NamedTuple):
    """What the output of a layer is added to, if that is all that reads the output.

    Attributes:
      value: the other operand of the sum.
      activation: what follows the sum.
    """

    value: core.Var
    activation: Activation


class Site(NamedTuple):
    """Where a layer stands in the flat jaxpr.

    Attributes:
      layer: its description.
      input: the variable it reads.
      kernel: the atom of its kernel.
      chain: the positions of its equations, contraction first.
      affine: the affine operations among them.
      movement: the equations among them that only move elements.
      output: the pre-activation output.
      activated: the value after the activation (`output` where there is none).
      activation: the equations between the two.
      shortcut: what its output is added to, None if it goes anywhere else.
    """

    layer: Layer
    input: core.Var
    kernel: Atom
    chain: tuple[int, ...]
    affine: tuple[Affine, ...]
    movement: tuple[core.JaxprEqn, ...]
    output: core.Var
    activated: core.Var
    activation: tuple[core.JaxprEqn, ...]
    shortcut: Shortcut | None


class Skipped(NamedTuple):
    """A contraction that stays in float, and why."""

    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    reason: str


class Network(NamedTuple):
    """A flat jaxpr and its layers in dataflow order."""

    flat: FlatJaxpr
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]


def path_names(tree: Any) -> tuple[str, ...]:
    """The path of every leaf of a pytree, its keys joined by "/"."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)


def trace(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> tuple[Layer, ...]:
    """Finds the layers of a network, in dataflow order.

    Args:
      apply_fn: a pure inference function of (params, x).
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      x: an input with a leading batch axis, or its shape as `jax.ShapeDtypeStruct`.

    Returns:
      One `Layer` per convolution or dot product with a kernel.

    Raises:
      ValueError: a layer stands where it cannot be rewritten (inside `scan`, `while`, `cond`,
        `custom_vjp`), or its kernel is not in `params`.
    """
    return tuple(site.layer for site in find_layers(apply_fn, params, x).sites)


def find_layers(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> Network:
    """Traces a network and finds where its layers stand; see `trace`."""
    flat = jaxpr.flatten(apply_fn, params, x)
    paths = path_names(params)
    sizes = [math.prod(shape(var)) for var in flat.params]
    found = jaxpr.dependences(flat)
    graph = _Graph(flat)
    live = jaxpr.needed(flat)
    sites, kernels, skipped = [], [], []
    for position, equation in enumerate(flat.equations):
        if position not in live or not jaxpr.contains_contraction(equation):
            continue
        operands = [jaxpr.depends_on([atom], found) for atom in equation.invars]
        if not any(operand.x for operand in operands):
            continue
        by_params = [i for i, operand in enumerate(operands) if operand.params_only]
        leaves = [i for operand in by_params for i in operands[operand].params]
        kernel_leaf = max(leaves, key=sizes.__getitem__, default=None)
        name = "" if kernel_leaf is None else paths[kernel_leaf]
        if equation.primitive.name not in jaxpr.CONTRACTIONS:
            if by_params:
                raise _refusal(equation, name)
            skipped.append(_skip(equation, "a product of two activations"))
        elif by_params:
            sites.append(_site(graph, found, position, by_params[0] == 0, name))
            kernels.append(name)
        elif any(operand.constant and not operand.x for operand in operands):
            raise ValueError(
                f"the kernel of a {equation.primitive.name} of shape "
                f"{shape(equation.invars[1])} is closed over by `apply_fn` and not in "
                "`params`, so it has no name; pass it in through `params`."
            )
        elif all(operand.x for operand in operands):
            skipped.append(_skip(equation, "a product of two activations"))
        else:
            skipped.append(_skip(equation, "its kernel is computed without params"))
    batch = max((shape(var)[0] for var in flat.inputs if shape(var)), default=1)
    named = _with_names(sites, _layer_names(kernels, paths), max(batch, 1))
    return Network(flat, named, tuple(skipped))


def _refusal(equation: core.JaxprEqn, name: str) -> ValueError:
    primitive = equation.primitive.name
    remedy = _REMEDY.get(primitive, "call its body directly")
    return ValueError(
        f"layer {name!r} stands inside `{primitive}`, where it cannot be rewritten; {remedy}."
    )


def _skip(equation: core.JaxprEqn, reason: str) -> Skipped:
    return Skipped(equation.primitive.name, tuple(map(shape, equation.invars)), reason)


def _with_names(sites: Sequence[Site], names: Sequence[str], batch: int) -> tuple[Site, ...]:
    return tuple(
        site._replace(
            layer=dataclasses.replace(site.layer, name=name, macs=site.layer.macs // batch)
        )
        for site, name in zip(sites, names, strict=True)
    )


def _layer_names(kernels: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Names layers by the folder of their kernel, or by the whole path where that is ambiguous."""
    trimmed = {path: _trim(path) for path in paths}
    folders = collections.Counter(
        trimmed[path].rpartition("/")[0] for path in dict.fromkeys(kernels)
    )
    names, seen = [], collections.Counter()
    for path in kernels:
        folder = trimmed[path].rpartition("/")[0]
        name = folder if folder and folders[folder] == 1 else trimmed[path]
        names.append(f"{name}@{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _trim(path: str) -> str:
    keys = path.split("/")
    keys = keys[1:] if keys[0] == "params" and len(keys) > 1 else keys
    keys = keys[:-1] if keys[-1] in ("value", "raw_value") and len(keys) > 1 else keys
    return "/".join(keys)


class _Graph:
    """Who reads and who writes each variable of a flat jaxpr."""

    def __init__(self, flat: FlatJaxpr) -> None:
        self.equations = flat.equations
        self.readers: dict[core.Var, list[int]] = collections.defaultdict(list)
        self.writer: dict[core.Var, core.JaxprEqn] = {}
        for position in sorted(jaxpr.needed(flat)):
            equation = flat.equations[position]
            for var in jaxpr.variables(equation.invars):
                self.readers[var].append(position)
            self.writer.update(dict.fromkeys(equation.outvars, equation))
        for var in jaxpr.variables(flat.outputs):
            self.readers[var].append(len(flat.equations))

    def only_reader(self, var: core.Var) -> int | None:
        """The position of the one equation that reads `var`, None for several or an output."""
        readers = self.readers[var]
        if len(readers) != 1 or readers[0] == len(self.equations):
            return None
        return readers[0]


def _site(
    graph: _Graph,
    found: Mapping[core.Var, jaxpr.Dependence],
    position: int,
    kernel_is_lhs: bool,
    name: str,
) -> Site:
    equation = graph.equations[position]
    try:
        operation = linear_operation(equation, kernel_is_lhs)
    except ValueError as error:
        raise ValueError(f"layer {name!r} is {error}, which is not supported.") from error
    operands: list[Any] = equation.invars[:: 1 if kernel_is_lhs else -1]
    kernel, x = operands
    chain, affine, movement, output = _affine_chain(graph, found, position, operation)
    activation, steps, activated = _activation(graph, output)
    layer = Layer(
        name=name,
        kind=operation.kind,
        activation=activation,
        kernel_shape=shape(kernel),
        input_shape=shape(x),
        output_shape=shape(output),
        macs=math.prod(shape(equation.outvars[0])) * operation.matrix_shape[1],
        operation=operation,
    )
    shortcut = _shortcut(graph, found, output)
    return Site(layer, x, kernel, chain, affine, movement, output, activated, steps, shortcut)


def _shortcut(
    graph: _Graph, found: Mapping[core.Var, jaxpr.Dependence], output: core.Var
) -> Shortcut | None:
    reader = graph.only_reader(output)
    if reader is None or graph.equations[reader].primitive.name != "add":
        return None
    others: list[Any] = [a for a in graph.equations[reader].invars if a is not output]
    is_value = len(others) == 1 and jaxpr.depends_on(others, found).x
    if not is_value or shape(others[0]) != shape(output):
        return None
    activation, _, _ = _activation(graph, graph.equations[reader].outvars[0])
    return Shortcut(others[0], activation)


def _affine_chain(
    graph: _Graph,
    found: Mapping[core.Var, jaxpr.Dependence],
    position: int,
    operation: Linear,
) -> tuple[tuple[int, ...], tuple[Affine, ...], tuple[core.JaxprEqn, ...], core.Var]:
    """Follows the per-channel affine operations behind a contraction.

    Operations that only move elements are followed too, and kept if an affine one comes after.
    """
    var = graph.equations[position].outvars[0]
    ndim = len(shape(var))
    channel_axes = tuple(axis % ndim for axis in operation.channel_axes)
    chain, affine, movement = [position], [], []
    kept = ((position,), (), (), var)
    while (reader := graph.only_reader(var)) is not None:
        equation = graph.equations[reader]
        moved = _moved_axes(equation, channel_axes)
        if moved is not None:
            movement.append(equation)
            channel_axes = moved
        else:
            step = _affine_step(graph, found, equation, var, channel_axes)
            if step is None:
                break
            affine.append(step)
        chain.append(reader)
        var = equation.outvars[0]
        if moved is None:
            kept = (tuple(chain), tuple(affine), tuple(movement), var)
    return kept


def _affine_step(
    graph: _Graph,
    found: Mapping[core.Var, jaxpr.Dependence],
    equation: core.JaxprEqn,
    var: core.Var,
    channel_axes: tuple[int, ...],
) -> Affine | None:
    primitive = equation.primitive.name
    if primitive not in _AFFINE:
        return None
    is_reversed = equation.invars[0] is not var
    operand = equation.invars[0 if is_reversed else 1]
    if operand is var or (primitive == "div" and is_reversed):
        return None
    if jaxpr.depends_on([operand], found).x:
        return None
    ndim = len(shape(var))
    if shape(equation.outvars[0]) != shape(var):
        return None
    source: Any = operand
    axes = tuple(range(len(shape(operand))))
    writer = None if jaxpr.is_literal(source) else graph.writer.get(source)
    if writer is not None and writer.primitive.name == "broadcast_in_dim":
        axes = tuple(writer.params["broadcast_dimensions"])
        source = writer.invars[0]
    per_channel = all(
        size == 1 or axis in channel_axes for axis, size in zip(axes, shape(source), strict=True)
    )
    return Affine(primitive, source, axes, channel_axes, ndim, is_reversed) if per_channel else None


def _moved_axes(equation: core.JaxprEqn, channel_axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where an operation that only moves elements puts the channel axes, None if it does more."""
    name, params = equation.primitive.name, equation.params
    if name not in _MOVEMENT:
        return None
    before = shape(equation.invars[0])
    after = shape(equation.outvars[0])
    if name in ("convert_element_type", "copy"):
        is_float = jax.numpy.issubdtype(dtype(equation.outvars[0]), jax.numpy.floating)
        return channel_axes if is_float else None
    if name == "transpose":
        return tuple(params["permutation"].index(axis) for axis in channel_axes)
    if name == "broadcast_in_dim":
        if math.prod(before) != math.prod(after):
            return None
        return tuple(params["broadcast_dimensions"][axis] for axis in channel_axes)
    if params.get("dimensions") and name == "reshape":
        return None
    moved = [_reshaped_axis(before, after, axis) for axis in channel_axes]
    found = tuple(axis for axis in moved if axis is not None)
    return found if len(found) == len(moved) else None


def _reshaped_axis(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    behind = math.prod(before[axis + 1 :])
    for candidate, size in enumerate(after):
        if size == before[axis] and math.prod(after[candidate + 1 :]) == behind:
            return candidate
    return None


Bounds = tuple[float, float]


def _activation(
    graph: _Graph, output: core.Var
) -> tuple[Activation, tuple[core.JaxprEqn, ...], core.Var]:
    """Recognises what follows a layer's output by what it computes: clip(x, low, high) or more."""
    bounds: Bounds = (-math.inf, math.inf)
    steps: list[core.JaxprEqn] = []
    clipping, activated, var = (), output, output
    while (reader := graph.only_reader(var)) is not None:
        equation = graph.equations[reader]
        result = clip_bounds(equation, {var: bounds})
        if result is None:
            if not clipping and _is_elementwise(equation, var):
                return "other", (*steps, equation), equation.outvars[0]
            break
        steps.append(equation)
        var = equation.outvars[0]
        if result != bounds:
            clipping, activated = tuple(steps), var
        bounds = result
    names: dict[Bounds, Activation] = {(-math.inf, math.inf): "none", (0.0, math.inf): "relu"}
    names[0.0, 6.0] = "relu6"
    return names.get(bounds, "other"), clipping, activated


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
    if name in _MOVEMENT:
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
    return name in _MOVEMENT and math.prod(shape(equation.invars[0])) > 1


_SELECTIONS = ("reduce_window_max", "reduce_max", "slice", "rev")


def keeps_codes(equation: core.JaxprEqn, var: core.Var, high: float) -> bool:
    """Whether an equation only selects or moves values of `var`, or clips them to [0, `high`].

    Args:
      equation: an equation that reads `var`.
      var: values that are multiples of one scale, up to `high`.
      high: the greatest of them.
    """
    if jaxpr.variables(equation.invars) != [var]:
        return False
    if equation.primitive.name in _SELECTIONS:
        return True
    if dtype(equation.outvars[0]) != dtype(var):
        return False
    bounds = clip_bounds(equation, {var: (-math.inf, math.inf)})
    return bounds is not None and bounds[0] in (-math.inf, 0.0) and bounds[1] >= high


def _narrow(bounds: Bounds, primitive: Callable[..., float], limit: float) -> Bounds:
    low, high = bounds
    return primitive(low, limit), primitive(high, limit)
