"""What stands between layers as ONNX nodes, by primitive."""

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qjax.export.sizes import Batch
from qjax.export.writer import (
    EVERYTHING,
    Rule,
    Tensor,
    Value,
    Writer,
    clipped,
    result,
    with_zero,
)
from qjax.graph import jaxpr
from qjax.graph.activation import clip_bounds
from qjax.graph.jaxpr import Atom, dtype, shape

Equation = core.JaxprEqn
Values = Sequence[Value]


def write_equation(writer: Writer, equation: Equation, values: Values) -> list[Value]:
    """Writes an equation, or evaluates it where nothing depends on the input.

    Args:
      writer: of the network.
      equation: between layers.
      values: of its operands.

    Returns:
      Tensors and arrays, one per result.

    Raises:
      ValueError: there is no rule for it.
    """
    if not any(isinstance(value, Tensor) for value in values):
        arrays = [jnp.asarray(v, dtype(a)) for v, a in zip(values, equation.invars, strict=True)]
        return jaxpr.bind(equation, arrays)
    name = equation.primitive.name
    if name in jaxpr.CALLS:
        return _call(writer, equation, values)
    rule = RULES.get(name)
    if rule is None:
        raise refusal(writer, equation, "has no rule in qjax.export.primitives")
    return list(rule(writer, equation, values))


def refusal(writer: Writer, equation: Equation, why: str) -> ValueError:
    """The error for an equation that cannot be written."""
    shapes = ", ".join(str(shape(atom)) for atom in equation.invars)
    return ValueError(
        f"`{equation.primitive.name}` {writer.where}, of shapes {shapes}, {why}; compute it "
        "outside of the exported function, or with other operations."
    )


# ---- Calls


def _call(writer: Writer, equation: Equation, values: Values) -> list[Value]:
    """Writes what a call stands for: a clip, or the equations of its body."""
    variables = jaxpr.variables(equation.invars)
    if len(variables) == 1 and len(equation.outvars) == 1:
        bounds = clip_bounds(equation, {variables[0]: EVERYTHING})
        [value] = (v for v, atom in zip(values, equation.invars, strict=True) if atom in variables)
        if bounds is not None and _is_float(variables[0]):
            return [clipped(writer, value, bounds)]
    inner = jaxpr.body(equation)
    assert inner is not None
    env: jaxpr.Env = dict(zip(inner.jaxpr.constvars, inner.consts, strict=True))
    env.update(zip(inner.jaxpr.invars, values, strict=True))
    for step in inner.jaxpr.eqns:
        operands = [jaxpr.read(env, atom) for atom in step.invars]
        env.update(zip(step.outvars, write_equation(writer, step, operands), strict=True))
    return [jaxpr.read(env, atom) for atom in inner.jaxpr.outvars]


def _is_float(atom: Atom) -> bool:
    return bool(jnp.issubdtype(dtype(atom), jnp.floating))


# ---- Elements


def elementwise(operator: str, **attributes: Any) -> Rule:
    """The rule of a function of elements that is an ONNX operator."""

    def rule(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
        names, like = operands(writer, equation, values)
        return [result(like, writer.graph.node(operator, *names, **attributes))]

    return rule


Formula = Callable[[Callable[..., str], Callable[[float], str], str], str]


def formula(function: Formula) -> Rule:
    """The rule of a function of one operand that takes several operators.

    Args:
      function: of (makes a node, makes a scalar of the operand's type, the operand): the result.
    """

    def rule(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
        [name], like = operands(writer, equation, values)
        atom = equation.invars[0]
        scalar = partial(constant_like, writer, atom)
        return [result(like, function(writer.graph.node, scalar, name))]

    return rule


def operands(writer: Writer, equation: Equation, values: Values) -> tuple[list[str], Tensor]:
    """The names of an equation's operands with their axes alike, and a tensor that lies so."""
    atoms, out = equation.invars, equation.outvars[0]
    rank = len(shape(out))
    tensors = [v for v in values if isinstance(v, Tensor) and len(v.order) == rank]
    largest = min(tensors, key=lambda tensor: len(tensor.repeated), default=None)
    order = tuple(range(rank)) if largest is None else largest.order
    names, repeated = (
        [],
        frozenset(axis for axis, size in enumerate(writer.sizes(out)) if size != 1),
    )
    for value, atom in zip(values, atoms, strict=True):
        own = order if len(shape(atom)) == rank else range(len(shape(atom)))
        names.append(writer.arranged(value, atom, own, keeps_repeated=True))
        if len(shape(atom)) == rank:
            repeated &= _held_once(writer, value, atom)
    return names, Tensor("", order, repeated)


def _held_once(writer: Writer, value: Value, atom: Atom) -> frozenset[int]:
    """The axes of size 1 of the tensor that holds a value."""
    ones = frozenset(axis for axis, size in enumerate(writer.sizes(atom)) if size == 1)
    if isinstance(value, Tensor):
        return ones | value.repeated
    return ones | writer.condensed(value, atom)[1]


def constant_like(writer: Writer, atom: Atom, number: float) -> str:
    """A scalar of an atom's type."""
    return writer.graph.constant(np.asarray(number, dtype(atom)))


def unlike(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Compares for being unlike."""
    names, like = operands(writer, equation, values)
    return [result(like, writer.graph.node("Not", writer.graph.node("Equal", *names)))]


def clip(operator: str) -> Rule:
    """The rule of `max` and `min`: a clip where the other operand is a number."""
    general = elementwise(operator)

    def rule(writer: Writer, equation: Equation, values: Values) -> Sequence[Tensor]:
        numbers = [writer.scalar(v, a) for v, a in zip(values, equation.invars, strict=True)]
        tensors = [v for v in values if isinstance(v, Tensor)]
        known = [number for number in numbers if number is not None]
        if len(tensors) == 1 and known and _is_float(equation.outvars[0]):
            low, high = (known[0], math.inf) if operator == "Max" else (-math.inf, known[0])
            if len(tensors[0].order) == len(shape(equation.outvars[0])):
                return [clipped(writer, tensors[0], (low, high))]
        return general(writer, equation, values)

    return rule


def clamp(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """`lax.clamp(low, x, high)`."""
    low, value, high = (
        writer.scalar(v, a) if i != 1 else v
        for i, (v, a) in enumerate(zip(values, equation.invars, strict=True))
    )
    if isinstance(value, Tensor) and low is not None and high is not None:
        if _is_float(equation.outvars[0]):
            return [clipped(writer, value, (low, high))]
    (low, name, high), like = operands(writer, equation, values)
    graph = writer.graph
    return [result(like, graph.node("Min", graph.node("Max", name, low), high))]


def divide(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Divides; a sum by the number of its summands is a mean."""
    divisor = writer.scalar(values[1], equation.invars[1])
    return _mean_or(writer, equation, values, "Div", divisor)


def multiply(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Multiplies; a sum by one over the number of its summands is a mean."""
    factor = writer.scalar(values[1], equation.invars[1])
    return _mean_or(writer, equation, values, "Mul", 1 / factor if factor else None)


def _mean_or(
    writer: Writer, equation: Equation, values: Values, operator: str, divisor: float | None
) -> list[Tensor]:
    value = values[0]
    if isinstance(value, Tensor) and value.mean is not None and divisor is not None:
        name, count = value.mean
        if math.isclose(divisor, count, rel_tol=1e-7):
            return [result(value, name)]
    return list(elementwise(operator)(writer, equation, values))


def integer_power(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Multiplies a value with itself, or divides 1 by that."""
    [name], like = operands(writer, equation, values)
    exponent, graph = equation.params["y"], writer.graph
    power = constant_like(writer, equation.outvars[0], 1) if exponent == 0 else None
    square, left = name, abs(exponent)
    while left:  # by repeated squaring
        if left % 2:
            power = square if power is None else graph.node("Mul", power, square)
        left //= 2
        square = graph.node("Mul", square, square) if left else square
    assert power is not None
    return [result(like, graph.node("Reciprocal", power) if exponent < 0 else power)]


def select(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Takes each element from one of two or more cases."""
    names, like = operands(writer, equation, values)
    which, *cases = names
    graph, index = writer.graph, equation.invars[0]
    if dtype(index) == jnp.bool_:
        return [result(like, graph.node("Where", which, *cases[::-1]))]
    name = cases[0]
    for number, case in enumerate(cases[1:], 1):
        is_case = graph.node("Equal", which, constant_like(writer, index, number))
        name = graph.node("Where", is_case, case, name)
    return [result(like, name)]


def round_half(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Rounds half to even, or away from zero."""
    [name], like = operands(writer, equation, values)
    graph = writer.graph
    if int(equation.params["rounding_method"]) == 1:
        return [result(like, graph.node("Round", name))]
    half = constant_like(writer, equation.invars[0], 0.5)
    size = graph.node("Floor", graph.node("Add", graph.node("Abs", name), half))
    return [result(like, graph.node("Mul", graph.node("Sign", name), size))]


def convert(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Changes the type of elements."""
    before, after = dtype(equation.invars[0]), dtype(equation.outvars[0])
    if before == after:
        return list(values)
    return [result(values[0], writer.cast(values[0].name, after))]


def keep(writer: Writer, equation: Equation, values: Values) -> Values:
    """Does nothing."""
    return values


# ---- Moves


def transpose(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Nothing is written: the order of the axes is another one."""
    new = equation.params["permutation"]  # axis i of the result is axis new[i]
    place = {old: axis for axis, old in enumerate(new)}
    value = values[0]
    return [
        dataclasses.replace(
            value,
            order=tuple(place[axis] for axis in value.order),
            repeated=frozenset(place[axis] for axis in value.repeated),
        )
    ]


def reshape(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Reads the elements in another shape."""
    atom, out = equation.invars[0], equation.outvars[0]
    if writer.sizes(atom) == writer.sizes(out):
        return list(values)
    _refuse_joined(writer, equation, out)
    name = writer.reshaped(writer.plain(values[0], atom), writer.sizes(out))
    return [Tensor(name, tuple(range(len(shape(out)))), bounds=values[0].bounds)]


def _refuse_joined(writer: Writer, equation: Equation, out: Atom) -> None:
    if sum(isinstance(size, Batch) for size in writer.sizes(out)) > 1:
        raise refusal(writer, equation, "has several axes that grow with the number of examples")


def broadcast(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Gives a value new axes, which hold what was there once."""
    value, atom, out = values[0], equation.invars[0], equation.outvars[0]
    kept = equation.params["broadcast_dimensions"]
    new = [axis for axis in range(len(shape(out))) if axis not in kept]
    order = (*new, *(kept[axis] for axis in value.order))
    if list(value.order) == sorted(value.order):
        order = tuple(range(len(order)))
    places = [order.index(axis) for axis in new]
    name = value.name
    if new:
        name = writer.graph.node("Unsqueeze", name, writer.integers(places))
    before, after = writer.sizes(atom), writer.sizes(out)
    grown = [kept[a] for a, size in enumerate(before) if size == 1 and after[kept[a]] != 1]
    repeated = {*(kept[a] for a in value.repeated), *grown, *(a for a in new if after[a] != 1)}
    grid = None if new else value.grid
    return [Tensor(name, order, frozenset(repeated), value.bounds, grid)]


def squeeze(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Drops axes of size 1."""
    value, dropped = values[0], {d % len(values[0].order) for d in equation.params["dimensions"]}
    name = _squeezed(writer, value, value.name, dropped)
    return [_without_axes(value, name, dropped)]


def _squeezed(writer: Writer, value: Tensor, name: str, dropped: set[int]) -> str:
    places = sorted(value.order.index(axis) for axis in dropped)
    return writer.graph.node("Squeeze", name, writer.integers(places)) if places else name


def _without_axes(value: Tensor, name: str, dropped: set[int]) -> Tensor:
    """A tensor without some axes of another."""
    kept = [axis for axis in range(len(value.order)) if axis not in dropped]
    place = {axis: i for i, axis in enumerate(kept)}
    order = tuple(place[axis] for axis in value.order if axis in place)
    repeated = frozenset(place[axis] for axis in value.repeated if axis in place)
    return Tensor(name, order, repeated, value.bounds)


def concatenate(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Joins values along an axis."""
    order = next(value.order for value in values if isinstance(value, Tensor))
    pairs = zip(values, equation.invars, strict=True)
    names = [writer.arranged(value, atom, order) for value, atom in pairs]
    axis = order.index(equation.params["dimension"])
    return [Tensor(writer.graph.node("Concat", *names, axis=axis), order)]


def stack(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Joins values along a new axis."""
    axis, rank = equation.params["axis"], len(shape(equation.outvars[0]))
    place = writer.integers([axis])
    names = [
        writer.graph.node("Unsqueeze", writer.plain(value, atom), place)
        for value, atom in zip(values, equation.invars, strict=True)
    ]
    return [Tensor(writer.graph.node("Concat", *names, axis=axis), tuple(range(rank)))]


def tile(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Repeats a value along axes."""
    value = writer.placed(values[0], equation.invars[0], values[0].order)
    repeats = [equation.params["reps"][axis] for axis in value.order]
    return [result(value, writer.graph.node("Tile", value.name, writer.integers(repeats)))]


def slices(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Takes a part of an axis, or every so many elements of it."""
    params, atom, out = equation.params, equation.invars[0], equation.outvars[0]
    starts, ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    before, after = writer.sizes(atom), writer.sizes(out)
    value = writer.placed(values[0], atom, values[0].order)
    cut = [a for a in range(len(starts)) if before[a] != after[a] or starts[a] or steps[a] > 1]
    if not cut:
        return [value]
    if any(isinstance(after[axis], Batch) for axis in cut):
        raise refusal(writer, equation, "takes a part of the examples")
    columns = [[column[axis] for axis in cut] for column in (starts, ends, steps)]
    return [_sliced(writer, value, cut, *columns)]


def _sliced(
    writer: Writer,
    value: Tensor,
    axes: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    places = [value.order.index(axis) for axis in axes]
    numbers = map(writer.integers, (starts, ends, places, steps))
    name = writer.graph.node("Slice", value.name, *numbers)
    return Tensor(name, value.order, bounds=value.bounds)


def reverse(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Turns axes round."""
    axes = equation.params["dimensions"]
    value = writer.placed(values[0], equation.invars[0], values[0].order)
    least = np.iinfo(np.int64).min
    count = len(axes)
    return [_sliced(writer, value, axes, [-1] * count, [least] * count, [-1] * count)]


def split(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Cuts a value into parts along an axis."""
    value = writer.placed(values[0], equation.invars[0], values[0].order)
    sizes = [int(size) for size in equation.params["sizes"]]
    axis = value.order.index(equation.params["axis"])
    if any(
        isinstance(writer.sizes(out)[equation.params["axis"]], Batch) for out in equation.outvars
    ):
        raise refusal(writer, equation, "takes a part of the examples")
    names = writer.graph.outputs(len(sizes), "Split", value.name, writer.integers(sizes), axis=axis)
    return [Tensor(name, value.order, bounds=value.bounds) for name in names]


def pad(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Adds elements at the edges and between elements, or cuts off."""
    atom, config = equation.invars[0], equation.params["padding_config"]
    order = values[0].order if isinstance(values[0], Tensor) else tuple(range(len(config)))
    name = writer.arranged(values[0], atom, order)
    filler = writer.plain(values[1], equation.invars[1])
    sizes = tuple(writer.sizes(atom)[axis] for axis in order)
    if any(any(config[axis]) and isinstance(sizes[i], Batch) for i, axis in enumerate(order)):
        raise refusal(writer, equation, "adds to the examples")
    name = writer.dilated(name, sizes, [config[axis][2] for axis in order], filler)
    edges = [(config[axis][0], config[axis][1]) for axis in order]
    number = writer.scalar(values[1], equation.invars[1])
    known = values[0].bounds if isinstance(values[0], Tensor) and number == 0 else EVERYTHING
    return [Tensor(writer.padded(name, edges, filler), order, bounds=with_zero(known))]


# ---- Along axes


def reduction(operator: str) -> Rule:
    """The rule of a reduction of axes."""

    def rule(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
        value = writer.placed(values[0], equation.invars[0], values[0].order)
        axes = set(equation.params["axes"])
        return [_without_axes(value, _reduced(writer, operator, value, axes), axes)]

    return rule


def _reduced(writer: Writer, operator: str, value: Tensor, axes: set[int]) -> str:
    places = writer.integers(sorted(value.order.index(axis) for axis in axes))
    return writer.graph.node(operator, value.name, places, keepdims=0)


def reduce_sum(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Adds up axes; the mean is at hand for a division by the number of summands."""
    atom = equation.invars[0]
    value = writer.placed(values[0], atom, values[0].order)
    axes = set(equation.params["axes"])
    total = _without_axes(value, _reduced(writer, "ReduceSum", value, axes), axes)
    total = dataclasses.replace(total, bounds=EVERYTHING)
    counts = [writer.sizes(atom)[axis] for axis in axes]
    if any(isinstance(count, Batch) for count in counts) or not _is_float(atom):
        return [total]
    is_image = len(value.order) > 3 or value.order == (0, 2, 1)
    if is_image and axes == set(value.order[2:]):
        mean = writer.graph.node("GlobalAveragePool", value.name)
        mean = _squeezed(writer, value, mean, axes)
    else:
        mean = _reduced(writer, "ReduceMean", value, axes)
    count = math.prod(count for count in counts if not isinstance(count, Batch))
    return [dataclasses.replace(total, mean=(mean, count))]


def logical_reduction(operator: str) -> Rule:
    """The rule of `reduce_and` and `reduce_or`."""

    def rule(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
        value = writer.placed(values[0], equation.invars[0], values[0].order)
        axes = set(equation.params["axes"])
        numbers = dataclasses.replace(value, name=writer.cast(value.name, np.int32))
        name = writer.cast(_reduced(writer, operator, numbers, axes), np.bool_)
        return [_without_axes(value, name, axes)]

    return rule


def arg_extreme(operator: str) -> Rule:
    """The rule of `argmax` and `argmin`."""

    def rule(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
        value = writer.placed(values[0], equation.invars[0], values[0].order)
        [axis] = equation.params["axes"]
        place = value.order.index(axis)
        name = writer.graph.node(operator, value.name, axis=place, keepdims=0)
        name = writer.cast(name, equation.params["index_dtype"])
        return [dataclasses.replace(_without_axes(value, name, {axis}), bounds=EVERYTHING)]

    return rule


def cumulative_sum(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Adds up along an axis, and keeps every sum."""
    value = writer.placed(values[0], equation.invars[0], values[0].order)
    axis = writer.integers(value.order.index(equation.params["axis"]))
    backwards = int(equation.params["reverse"])
    return [result(value, writer.graph.node("CumSum", value.name, axis, reverse=backwards))]


def pool(operator: str, **attributes: int) -> Rule:
    """The rule of a pool: MaxPool, or AveragePool for a sum."""

    def rule(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
        params = equation.params
        windows = list(
            zip(
                params["window_dimensions"],
                params["window_strides"],
                params["padding"],
                params["window_dilation"],
                strict=True,
            )
        )
        order = _pool_order(windows, values[0].order)
        if order is None or any(d > 1 for d in params["base_dilation"]):
            raise refusal(writer, equation, "pools axes that no pool of ONNX does")
        value = writer.placed(values[0], equation.invars[0], order)
        sizes, strides, pads, dilations = zip(*(windows[axis] for axis in order[2:]), strict=True)
        name = writer.graph.node(
            operator,
            value.name,
            kernel_shape=list(sizes),
            strides=list(strides),
            pads=[pad[side] for side in (0, 1) for pad in pads],
            **({"dilations": list(dilations)} if max(dilations) > 1 else {}),
            **attributes,
        )
        if operator == "MaxPool":
            return [Tensor(name, order, bounds=value.bounds)]
        count = math.prod(sizes)
        factor = constant_like(writer, equation.invars[0], count)
        total = writer.graph.node("Mul", name, factor)
        return [Tensor(total, order, mean=(name, count))]

    return rule


def _pool_order(windows: Sequence[Any], order: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of axes with two first that are not pooled, as they lie where that is so."""
    free = [axis for axis in order if windows[axis] == (1, 1, (0, 0), 1)]
    if len(order) < 3 or len(free) < 2:
        return None
    first = order[:2] if set(order[:2]) <= set(free) else sorted(free)[:1] + sorted(free)[-1:]
    return (*first, *sorted(axis for axis in order if axis not in first))


def product(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Multiplies two activations."""
    (contracting, batch), letters = equation.params["dimension_numbers"], iter(string.ascii_letters)
    ranks = [len(shape(atom)) for atom in equation.invars]
    names: list[list[str]] = [[""] * rank for rank in ranks]
    for pairs in (batch, contracting):
        for left, right in zip(*pairs, strict=True):
            names[0][left] = names[1][right] = next(letters)
    for own in names:
        own[:] = [letter or next(letters) for letter in own]
    shared = [names[0][axis] for axis in batch[0]]
    summed = {names[0][axis] for axis in contracting[0]}
    free = [letter for own in names for letter in own if letter not in summed | {*shared}]
    terms, tensors = [], []
    out = dtype(equation.outvars[0])
    for value, atom, own in zip(values, equation.invars, names, strict=True):
        order = value.order if isinstance(value, Tensor) else tuple(range(len(own)))
        name = writer.arranged(value, atom, order)
        tensors.append(name if dtype(atom) == out else writer.cast(name, out))
        terms.append("".join(own[axis] for axis in order))
    text = f"{terms[0]},{terms[1]}->{''.join([*shared, *free])}"
    name = writer.graph.node("Einsum", *tensors, equation=text)
    return [Tensor(name, tuple(range(len(shared) + len(free))))]


_UNARY = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "tan": "Tan",
    "tanh": "Tanh",
}
_BINARY = {
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
    "or": "Or",
    "pow": "Pow",
    "sub": "Sub",
    "xor": "Xor",
}


def rows(writer: Writer, equation: Equation, values: Values) -> list[Tensor]:
    """Rows of a table along its first axis, at indices that have an axis of length 1 at the end."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, indices = equation.invars
    rank = len(shape(equation.outvars[0]))
    is_rows = (
        numbers.start_index_map == numbers.collapsed_slice_dims == (0,)
        and not numbers.operand_batching_dims
        and tuple(sizes[1:]) == shape(table)[1:]
        and numbers.offset_dims == tuple(range(len(shape(indices)) - 1, rank))
    )
    if not is_rows:
        raise refusal(writer, equation, "picks something else than rows along the first axis")
    places = writer.plain(values[1], indices)
    last = writer.integers([len(shape(indices)) - 1])
    places = writer.graph.node("Squeeze", places, last)
    found = writer.graph.node("Gather", writer.plain(values[0], table), places, axis=0)
    return [Tensor(found, tuple(range(rank)))]


RULES: dict[str, Rule] = {
    **{name: elementwise(operator) for name, operator in (_UNARY | _BINARY).items()},
    "argmax": arg_extreme("ArgMax"),
    "argmin": arg_extreme("ArgMin"),
    "broadcast_in_dim": broadcast,
    "clamp": clamp,
    "concatenate": concatenate,
    "convert_element_type": convert,
    "copy": keep,
    "copy_p": keep,
    "cumsum": cumulative_sum,
    "div": divide,
    "dot_general": product,
    "erfc": formula(lambda node, scalar, x: node("Sub", scalar(1), node("Erf", x))),
    "exp2": formula(lambda node, scalar, x: node("Pow", scalar(2), x)),
    "expm1": formula(lambda node, scalar, x: node("Sub", node("Exp", x), scalar(1))),
    "gather": rows,
    "integer_pow": integer_power,
    "is_finite": formula(
        lambda node, scalar, x: node("Not", node("Or", node("IsInf", x), node("IsNaN", x)))
    ),
    "log1p": formula(lambda node, scalar, x: node("Log", node("Add", x, scalar(1)))),
    "max": clip("Max"),
    "min": clip("Min"),
    "mul": multiply,
    "ne": unlike,
    "not": elementwise("Not"),
    "optimization_barrier": keep,
    "pad": pad,
    "reduce_and": logical_reduction("ReduceMin"),
    "reduce_max": reduction("ReduceMax"),
    "reduce_min": reduction("ReduceMin"),
    "reduce_or": logical_reduction("ReduceMax"),
    "reduce_prod": reduction("ReduceProd"),
    "reduce_sum": reduce_sum,
    "reduce_window_max": pool("MaxPool"),
    "reduce_window_sum": pool("AveragePool", count_include_pad=1),
    "rem": elementwise("Mod", fmod=1),
    "reshape": reshape,
    "rev": reverse,
    "round": round_half,
    "rsqrt": formula(lambda node, scalar, x: node("Reciprocal", node("Sqrt", x))),
    "select_n": select,
    "slice": slices,
    "split": split,
    "square": formula(lambda node, scalar, x: node("Mul", x, x)),
    "squeeze": squeeze,
    "stack": stack,
    "stop_gradient": keep,
    "tile": tile,
    "transpose": transpose,
}
