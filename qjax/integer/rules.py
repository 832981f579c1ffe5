"""Rules of integer evaluation: layers on codes, and what acts on codes and sums between them.

* Reshapes, transpositions, slices, zero padding, concatenation on one grid and max-pooling act on
  codes as they are.
* ReLU and ReLU6 are clamps of codes, max(q, z); what clips off the grid is done as a sum is.
* Products of two activations with grids, see `qjax.integer.matmul`.
* Sums, in integer arithmetics: operands go to one grid, see `qjax.integer.codes`. A sum over n
  elements is taken as it is if n·L < 2^31, else on the grid s·L·n / 2^30; a division by a constant
  changes the scale alone, in an arithmetic of shifts where the constant is a power of two.

What has no rule, or whose rule returns None, is bound on real values.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qjax.formats.affine import QParams, quantize_array
from qjax.formats.dynamic import Dynamic
from qjax.graph import jaxpr
from qjax.graph.activation import clip_bounds
from qjax.graph.junctions import Junction
from qjax.graph.layers import Site
from qjax.graph.matmuls import Matmul
from qjax.graph.operation import (
    Linear,
    along_channels,
    from_channels_last,
    from_output_matrix,
    shape_of_output,
)
from qjax.integer import lowerings
from qjax.integer.accumulator import Accumulator, fit, is_sum_enough, sum_term_by_term
from qjax.integer.chunks import by_chunks, chunk_size
from qjax.integer.codes import (
    WIDE,
    Codes,
    GridKey,
    for_sum,
    for_union,
    held,
    on_grid,
    real_value,
    requantized,
    rescaled,
    stored,
    to_grid,
    wide_scale,
)
from qjax.integer.constants import Constants
from qjax.integer.lowerings import Lowering, signed
from qjax.integer.matmul import MatmulPlan, multiply_codes
from qjax.integer.requantize import Arithmetic
from qjax.run.interpreter import PrimitiveRule, Rules
from qjax.run.layer import QuantizedLayer, accumulator_scale, apply_linear, by_example
from qjax.run.matmul import QuantizedMatmul
from qjax.run.signs import count_signs

Record = Callable[[str, jax.Array], None]


class LayerPlan(NamedTuple):
    """What the program of a layer depends on, apart from shapes and types: hashable.

    Attributes:
      lowering: of its accumulator, None where that is no integer.
      inputs: the grid of its input, None in float.
      outputs: the grid of its output before the activation, None in float.
      activated: the grid of its output after the activation, None in float.
      limit: the greatest magnitude of its accumulator, where its output is a sum; else 0.
      accumulator: a narrower one to simulate.
    """

    lowering: Lowering | None
    inputs: GridKey | None
    outputs: GridKey | None
    activated: GridKey | None
    limit: int
    accumulator: Accumulator | None

    @property
    def lowering_of_sum(self) -> Lowering | None:
        """The lowering that computes the accumulator, also where a narrower one is simulated."""
        is_given = self.accumulator is None or self.lowering is None
        return self.lowering if is_given else Lowering(lowerings.INT8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the program of a network depends on, apart from shapes and types: hashable.

    Attributes:
      arithmetic: of requantization.
      layers: by name, in dataflow order.
      sums: the grids of junctions, by name.
      matmuls: products of two activations, by name.
    """

    arithmetic: Arithmetic
    layers: tuple[tuple[str, LayerPlan], ...]
    sums: tuple[tuple[str, GridKey], ...] = ()
    matmuls: tuple[tuple[str, MatmulPlan], ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.arithmetic, self.layers, self.sums, self.matmuls))

    def __hash__(self) -> int:
        """Computed once: every call of the network looks its program up."""
        return self._hash


def integer_rules(
    plan: Plan, constants: Mapping[str, Constants], record: Record | None = None
) -> Rules:
    """The rules that evaluate a network on integers.

    Args:
      plan: of the network.
      constants: of the layers that have an integer accumulator, by name.
      record: called with (name, accumulator) of every layer that has an integer one: int32[...], or
        the same integers as float32, in the layout of the layer's operation.
    """
    arithmetic, plans, sums = plan.arithmetic, dict(plan.layers), dict(plan.sums)
    matmuls = dict(plan.matmuls)

    def layer_rule(site: Site, layer: QuantizedLayer, value: Any) -> Codes | jax.Array:
        with jax.named_scope(site.layer.name):  # as profiles show it
            return in_scope(site, layer, value)

    def in_scope(site: Site, layer: QuantizedLayer, value: Any) -> Codes | jax.Array:
        name = site.layer.name
        planned = plans[name]
        if planned.lowering is None:
            x = real_value(value, site.input)
            y = apply_linear(site.layer.operation, layer, x, count_signs)
            return _real_output(site, layer, planned, y, arithmetic)
        if layer.sums_dynamic_codes:
            y = _sum_dynamic_codes(site, layer, planned.lowering, real_value(value, site.input))
            return _real_output(site, layer, planned, y, arithmetic)
        assert planned.inputs is not None
        assert layer.grid is not None
        found, dtype = constants[name], jaxpr.dtype(site.input)
        x = to_grid(value, layer.grid, planned.inputs, arithmetic, dtype)

        own = site.layer.operation
        operation, codes = own.channels_last, x.codes.transpose(own.input_order(x.codes.ndim))

        def accumulated(codes: jax.Array) -> jax.Array:
            acc = _accumulate(operation, layer, planned, found, x.replace(codes))
            return acc.astype(jnp.int32) if arithmetic.only_integers else acc

        if record is not None:
            record(name, from_channels_last(own, accumulated(codes)))
        return _output(site, layer, planned, found, accumulated, codes, arithmetic)

    def activated_rule(site: Site, layer: QuantizedLayer, value: Any) -> Any:
        key = plans[site.layer.name].activated
        match layer.activated:
            case None:
                return value
            case Dynamic() as format:
                return format.project(real_value(value, site.activated))
            case grid:
                assert key is not None
                return on_own_grid(value, grid, key, jaxpr.dtype(site.activated))

    def joined_rule(junction: Junction, grid: QParams, value: Any) -> Codes:
        return on_own_grid(value, grid, sums[junction.name], jaxpr.dtype(junction.var))

    def on_own_grid(value: Any, grid: QParams, key: GridKey, dtype: Any) -> Codes:
        return held(to_grid(value, grid, key, arithmetic, dtype), grid, dtype, arithmetic)

    def matmul_rule(step: Matmul, matmul: QuantizedMatmul, lhs: Any, rhs: Any) -> Any:
        return multiply_codes(step, matmul, matmuls[step.name], (lhs, rhs), arithmetic)

    primitives = primitive_rules(arithmetic)
    return Rules(layer_rule, activated_rule, primitives, real_value, joined_rule, matmul_rule)


# ---- Layers


def _real_output(
    site: Site, layer: QuantizedLayer, plan: LayerPlan, y: jax.Array, arithmetic: Arithmetic
) -> Codes | jax.Array:
    """Rounds real outputs of a layer's operation as the layer says."""
    match layer.outputs:
        case None:
            return site.movement(y)
        case Dynamic() as format:
            return site.movement(format.project(y))
        case grid:
            assert plan.outputs is not None
            codes = to_grid(y, grid, plan.outputs, arithmetic, y.dtype)
            found = held(codes, grid, site.movement.dtype, arithmetic)
            return found.replace(site.movement.of_codes(found.codes))


def _sum_dynamic_codes(
    site: Site, layer: QuantizedLayer, lowering: Lowering, x: jax.Array
) -> jax.Array:
    """Finds the range of an input and evaluates the layer on its codes, up to real outputs.

    acc = Σ q_w·(q_x − z_x) in int32 and y = s_w·s_x·(acc + q_b), the integers q_b in float32, as
    fake quantization computes it: see `qjax.run.layer.at_input`.
    """
    own = site.layer.operation
    operation = own.channels_last

    def outputs(at: QuantizedLayer, x: jax.Array) -> jax.Array:
        assert isinstance(at.inputs, QParams)
        inputs = signed(at.inputs)
        without_bias = dataclasses.replace(at, bias=jnp.zeros(at.bias.shape, jnp.int32))
        folded = lowerings.folded_bias(without_bias, lowering.method)
        operands = lowerings.operands(operation, without_bias, folded, lowering)
        codes = quantize_array(x, inputs).transpose(own.input_order(x.ndim))
        acc = lowerings.accumulate(operation, operands, codes, inputs.zero_point, lowering)
        acc = acc.astype(jnp.float32) + along_channels(operation, at.bias, acc.ndim)
        y = acc * along_channels(operation, accumulator_scale(operation, at), acc.ndim)
        return from_channels_last(own, y)

    return by_example(own, layer, outputs, x)


def _accumulate(
    operation: Linear, layer: QuantizedLayer, plan: LayerPlan, constants: Constants, x: Codes
) -> jax.Array:
    """Computes the accumulator of an operation, as wide as planned, in its layout."""
    lowering, narrow = plan.lowering_of_sum, plan.accumulator
    assert lowering is not None
    if narrow is not None and not is_sum_enough(narrow):
        return _accumulate_term_by_term(operation, layer, constants.bias, x, narrow)
    operands = lowerings.operands(operation, layer, constants.bias, lowering, constants.kernel)
    acc = lowerings.accumulate(operation, operands, x.codes, x.zero_point, lowering)
    return acc if narrow is None else fit(acc, narrow)


def _accumulate_term_by_term(
    operation: Linear, layer: QuantizedLayer, bias: jax.Array, x: Codes, narrow: Accumulator
) -> jax.Array:
    lowering = Lowering(lowerings.DOT)
    kernel = lowerings.operands(operation, layer, bias, lowering).kernel.astype(jnp.int32)
    groups, _, channels = kernel.shape
    own_bias = layer.bias.reshape(groups, channels)
    acc = sum_term_by_term(operation.patches(x.centered), kernel, own_bias, narrow)
    shape = shape_of_output(operation, x.codes.shape)
    return from_output_matrix(operation, acc, shape)


def _output(
    site: Site,
    layer: QuantizedLayer,
    plan: LayerPlan,
    constants: Constants,
    accumulated: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    arithmetic: Arithmetic,
) -> Codes | jax.Array:
    """Requantizes the accumulator of an input to the layer's output: codes, or a sum."""
    own, dtype = site.layer.operation, site.movement.dtype
    operation = own.channels_last
    outputs = layer.outputs if isinstance(layer.outputs, QParams) else None
    assert plan.lowering_of_sum is not None
    size = chunk_size(operation, plan.lowering_of_sum, x)

    def along(vector: jax.Array, acc: jax.Array) -> jax.Array:
        return along_channels(operation, vector, acc.ndim)

    def scaled(acc: jax.Array) -> Codes | jax.Array:
        multiplier = constants.multiplier
        return requantized(
            acc,
            along(constants.unit, acc),
            outputs,
            plan.outputs,
            plan.limit,
            dtype,
            arithmetic,
            None if multiplier is None else along(multiplier, acc),
        )

    def codes_of(x: jax.Array) -> jax.Array:
        found = scaled(accumulated(x))
        assert isinstance(found, Codes)
        return found.codes

    if outputs is not None and plan.outputs is not None:
        codes = from_channels_last(own, by_chunks(codes_of, x, size))
        grid = stored(outputs, plan.outputs)
        return on_grid(site.movement.of_codes(codes), grid, plan.outputs)
    acc = by_chunks(accumulated, x, size)
    if isinstance(layer.outputs, Dynamic):
        y = acc.astype(jnp.float32) * along(constants.unit, acc)
        return site.movement(from_channels_last(own, layer.outputs.project(y)))
    found = scaled(acc)
    if isinstance(found, Codes):
        return found.replace(site.movement.of_codes(from_channels_last(own, found.codes)))
    return site.movement(from_channels_last(own, found))


# ---- Equations between layers


def primitive_rules(arithmetic: Arithmetic) -> dict[str, PrimitiveRule]:
    """The rules of what acts on codes, and in arithmetics of integers on sums, by primitive.

    Args:
      arithmetic: of requantization.
    """
    rules: dict[str, PrimitiveRule] = dict.fromkeys((*_MOVES, *_MAXIMA), move)
    rules |= {"convert_element_type": partial(convert, arithmetic), "pad": pad}
    rules |= dict.fromkeys(_CLIPS, partial(clip, arithmetic))
    rules["concatenate"] = partial(concatenate, arithmetic)
    if arithmetic.only_integers:
        rules |= dict.fromkeys(("mul", "div"), partial(multiply, arithmetic))
        rules |= dict.fromkeys(("add", "add_any", "sub"), partial(add, arithmetic))
        rules |= dict.fromkeys(("reduce_sum", "reduce_window_sum"), partial(add_up, arithmetic))
    return rules


_MOVES = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "copy", "rev", "slice")
_MAXIMA = ("reduce_window_max", "reduce_max")
_CLIPS = ("max", "min", "clamp", *jaxpr.CALLS)


def move(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any] | None:
    """Acts on codes as on the values that they stand for."""
    value = values[0]
    if not isinstance(value, Codes):
        return None
    return [value.replace(array) for array in jaxpr.bind(equation, [value.codes])]


def convert(
    arithmetic: Arithmetic, equation: core.JaxprEqn, values: Sequence[Any]
) -> list[Any] | None:
    """Leaves codes as they are where another type of real numbers is asked for.

    Not after a type of few bits, unless nothing is rounded anyway: what it lost stays lost.
    """
    before, after = (jaxpr.dtype(v) for v in (equation.invars[0], equation.outvars[0]))
    if not isinstance(values[0], Codes) or not jnp.issubdtype(after, jnp.floating):
        return None
    is_exact = arithmetic.only_integers or jnp.finfo(before).nmant >= jnp.finfo(jnp.float32).nmant
    return [values[0]] if is_exact else None


def pad(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any] | None:
    """Pads with the code of 0, where 0 is the padding."""
    value = values[0]
    if not isinstance(value, Codes) or _number(equation.invars[1]) != 0:
        return None
    zero = value.zero_point.astype(value.codes.dtype)
    return [value.replace(array) for array in jaxpr.bind(equation, [value.codes, zero])]


def concatenate(
    arithmetic: Arithmetic, equation: core.JaxprEqn, values: Sequence[Any]
) -> list[Any] | None:
    """Joins codes of one grid, or any on a grid that holds them all."""
    if not _are_codes(values):
        return None
    if values[0].key is None or len({value.key for value in values}) > 1:
        if not arithmetic.only_integers:
            return None
        values = for_union(values, arithmetic)
    return _bound(equation, values)


def clip(
    arithmetic: Arithmetic, equation: core.JaxprEqn, values: Sequence[Any]
) -> list[Any] | None:
    """Clips codes to bounds that are on their grid, and a sum to any."""
    codes = [value for value in values if isinstance(value, Codes)]
    variables = jaxpr.variables(equation.invars)
    if not codes or len(variables) != 1 or len(equation.outvars) != 1:
        return None
    bounds = clip_bounds(equation, {variables[0]: (-math.inf, math.inf)})
    if bounds is None:
        return None
    (low, high), [value] = bounds, codes
    if value.key is not None and low in (-math.inf, 0.0) and high >= value.key.greatest:
        zero = value.zero_point.astype(value.codes.dtype)
        return [value.replace(jnp.maximum(value.codes, zero)) if low == 0.0 else value]
    if not arithmetic.only_integers:
        return None
    [value] = for_sum(codes, arithmetic)
    limits = [jnp.round(jnp.clip(b / value.scale, -WIDE, WIDE)) for b in bounds]
    return [value.replace(jnp.clip(value.codes, *(limit.astype(jnp.int32) for limit in limits)))]


def multiply(
    arithmetic: Arithmetic, equation: core.JaxprEqn, values: Sequence[Any]
) -> list[Any] | None:
    """Multiplies or divides by a positive constant: the scale changes, and no integer."""
    value, factor = values[0], _number(equation.invars[1])
    if not isinstance(value, Codes) or factor is None or factor <= 0:
        return None
    if arithmetic.only_shifts and math.frexp(factor)[0] != 0.5:
        return None
    by = operator.mul if equation.primitive.name == "mul" else operator.truediv
    greatest = None if value.greatest is None else by(value.greatest, factor)
    return [value.exact._replace(scale=by(value.scale, factor), greatest=greatest)]


def add(arithmetic: Arithmetic, equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any] | None:
    """Adds or subtracts on a grid that holds the sum."""
    return _bound(equation, for_sum(values, arithmetic)) if _are_codes(values) else None


def add_up(
    arithmetic: Arithmetic, equation: core.JaxprEqn, values: Sequence[Any]
) -> list[Any] | None:
    """Adds up elements, on a grid on which no sum leaves int32."""
    if not _are_codes(values):
        return None
    value, count = values[0].exact, _summands(equation)
    if count * value.limit >= 2**31:
        grid = wide_scale(value.scale * float(count * value.limit), arithmetic)
        value = rescaled(value, grid, arithmetic, WIDE // count)
    [total] = _bound(equation, [value])
    return [total._replace(limit=count * value.limit, greatest=None)]


def _bound(equation: core.JaxprEqn, values: Sequence[Codes]) -> list[Codes]:
    """Binds an equation on integers that are all on one grid."""
    integers = jaxpr.bind(equation, [value.codes for value in values])
    return [values[0].replace(array) for array in integers]


def _summands(equation: core.JaxprEqn) -> int:
    """How many elements make up one of a sum."""
    window = equation.params.get("window_dimensions")
    if window:
        return math.prod(window)
    before, after = (jaxpr.shape(atom) for atom in (equation.invars[0], equation.outvars[0]))
    return math.prod(before) // math.prod(after)


def _are_codes(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Codes) for value in values)


def _number(atom: jaxpr.Atom) -> float | None:
    is_scalar = jaxpr.is_literal(atom) and np.ndim(atom.val) == 0
    return float(atom.val) if is_scalar else None
