"""One quantized layer: its codes, and its evaluation in float arithmetic on codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.affine import QParams, float_codes, round_codes
from qjax.formats.base import elementwise, expand_groups
from qjax.formats.binary import Signs
from qjax.formats.dynamic import Dynamic
from qjax.formats.scales import power_of_two_above
from qjax.graph.operation import (
    Linear,
    along_channels,
    by_channel,
    scale_input_channels,
    shape_of_output,
)
from qjax.pytree import pytree
from qjax.run.signs import SumOfSigns, center, magnitudes, sum_of_signs

_MOST_BIAS = 2.0**30  # in units of s_w·s_x: the products have the other half of int32
_LEAST_UNIT = 2.0**-100  # of an accumulator, in real units


@pytree
@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """The parameters of one layer, its affine chain folded in.

    Attributes:
      kernel: [groups, patch, channels], see `qjax.linear`: codes; float32 if `weights` is None.
      bias: [groups * channels]: int32 at scale s_w·s_x where the accumulator is an integer, else
        float32 in real units.
      weights: `Format` of the kernel, [groups or 1, patch groups, channels or 1]; None in float.
      inputs: of the layer's input: `QParams`, scalars, or a scale per channel of the rank of the
        input, with zero point 0. The kernel is then that of the codes, w·s_x. Or `Dynamic`, see
        `at_input`, or `Signs`. None in float.
      outputs: of its output before the activation: `QParams`, scalars or per channel of the
        output's rank, or `Dynamic`.
      activated: of its output after the activation: `QParams`, scalars, or `Dynamic`.
    """

    kernel: jax.Array
    bias: jax.Array
    weights: Any
    inputs: Any
    outputs: Any
    activated: Any

    @property
    def grid(self) -> QParams | None:
        """The grid of codes of its input; None in float, for signs and for a range of run time."""
        return self.inputs if isinstance(self.inputs, QParams) else None

    @property
    def has_integer_accumulator(self) -> bool:
        """Whether the layer is a sum of products of codes, times one scale per output channel.

        That scale is known, and the bias is at it.
        """
        return self.grid is not None and self.has_scale_per_sum

    @property
    def sums_dynamic_codes(self) -> bool:
        """Whether it is such a sum once the range of its input is found."""
        return isinstance(self.inputs, Dynamic) and self.has_scale_per_sum

    @property
    def is_per_group(self) -> bool:
        """Whether the elements of a patch have more than one scale."""
        return self.weights is not None and self.weights.step.shape[1] > 1

    @property
    def group_size(self) -> int:
        """How many elements of a patch share a scale; the last group may have fewer."""
        return -(-self.kernel.shape[1] // self.weights.step.shape[1])

    @property
    def has_scale_per_sum(self) -> bool:
        """Whether the kernel's values are integers times one scale per output channel."""
        return self.weights is not None and self.weights.is_uniform and not self.is_per_group

    @property
    def folds_input_scales(self) -> bool:
        """Whether the scales of the input are factors of the kernel."""
        return self.grid is not None and self.grid.scale.ndim > 0


def accumulator_scale(operation: Linear, layer: QuantizedLayer) -> jax.Array:
    """The real value of one unit of the accumulator, float32[groups * channels].

    It is s_w·s_x, or s_w alone where s_x is folded into the kernel.
    """
    groups, _, channels = operation.matrix_shape
    scale = jnp.ones((groups, 1, channels), jnp.float32)
    if layer.has_scale_per_sum:
        scale = scale * layer.weights.scale
    if layer.grid is not None and not layer.folds_input_scales:
        scale = scale * layer.grid.scale
    return scale.reshape(-1)


def relative_codes(layer: QuantizedLayer) -> jax.Array:
    """The kernel in units of its scale, codes less zero points: float32[groups, patch, channels].

    A kernel in float, or whose values are no multiples of one scale, is in real units.
    """
    if layer.weights is None:
        return layer.kernel
    if not layer.weights.is_uniform:
        return scaled_kernel(layer)
    zero_point = expand_groups(layer.weights.zero_point, layer.kernel.shape[1])
    return (layer.kernel.astype(jnp.int32) - zero_point).astype(jnp.float32)


def scaled_kernel(layer: QuantizedLayer) -> jax.Array:
    """The kernel, scales of its codes applied, float32[groups, patch, channels]."""
    if layer.weights is None:
        return layer.kernel
    return elementwise(layer.weights, layer.kernel.shape[1]).decode(layer.kernel)


def dequantized_kernel(operation: Linear, layer: QuantizedLayer) -> jax.Array:
    """The kernel in real units, scales of the input taken out: float32[groups, patch, channels]."""
    if layer.grid is None or not layer.folds_input_scales:
        return scaled_kernel(layer)
    inverse = 1 / _by_input_channel(operation, layer.grid)
    return scale_input_channels(operation, scaled_kernel(layer), inverse)


def fold_input_scales(operation: Linear, inputs: QParams, kernel: jax.Array) -> jax.Array:
    """The kernel of an input's codes, where that has scales per channel: w·s_x."""
    return scale_input_channels(operation, kernel, _by_input_channel(operation, inputs))


def _by_input_channel(operation: Linear, inputs: QParams) -> jax.Array:
    return by_channel(operation.input_axes, inputs.scale).reshape(-1)


def dequantized_bias(operation: Linear, layer: QuantizedLayer) -> jax.Array:
    """The bias in real units, float32[groups * channels]."""
    if not layer.has_integer_accumulator:
        return layer.bias
    return layer.bias.astype(jnp.float32) * accumulator_scale(operation, layer)


def quantize_bias(operation: Linear, layer: QuantizedLayer, bias: jax.Array) -> jax.Array:
    """Rounds a bias to int32 at the accumulator's scale, where the accumulator is an integer.

    Args:
      operation: the linear operation.
      layer: the layer it belongs to; its own bias is not read.
      bias: float32[groups * channels] in real units.

    Returns:
      int32 codes clipped to ±(2^31 − 2^7), the largest float32 below 2^31; or `bias` as it is.
    """
    if not layer.has_integer_accumulator:
        return bias
    limit = 2.0**31 - 2.0**7
    codes = jnp.round(bias / accumulator_scale(operation, layer))
    return jnp.clip(codes, -limit, limit).astype(jnp.int32)


def with_bias(operation: Linear, layer: QuantizedLayer, bias: jax.Array) -> QuantizedLayer:
    """The layer with that bias, and with scales of its kernel that leave room for it.

    A channel whose weights are tiny has a bias beyond int32 at s_w·s_x. Its s_w rises by a power of
    two until |b| ≤ 2^30·s_w·s_x, and its weights are rounded to the codes of that scale.

    Args:
      operation: the linear operation.
      layer: its parameters; its own bias is not read.
      bias: float32[groups * channels] in real units.
    """
    if layer.has_integer_accumulator:
        layer = _with_room(operation, layer, bias)
    return dataclasses.replace(layer, bias=quantize_bias(operation, layer, bias))


def _with_room(operation: Linear, layer: QuantizedLayer, bias: jax.Array) -> QuantizedLayer:
    groups, _, channels = operation.matrix_shape
    step = layer.weights.step
    input_scale = 1.0 if layer.folds_input_scales else layer.inputs.scale
    least = jnp.maximum(jnp.abs(bias) / _MOST_BIAS, _LEAST_UNIT) / input_scale
    shared = [axis for axis in range(step.ndim) if step.shape[axis] == 1]
    least = jnp.max(least.reshape(groups, 1, channels), axis=shared, keepdims=True)
    raised = least > step
    factor = jnp.where(raised, power_of_two_above(least / step), 1.0)
    weights = layer.weights.scaled(factor)
    codes = elementwise(weights, layer.kernel.shape[1]).encode(scaled_kernel(layer))
    codes = jnp.where(raised, codes, layer.kernel)
    return dataclasses.replace(layer, kernel=codes, weights=weights)


def at_input(operation: Linear, layer: QuantizedLayer, x: jax.Array) -> QuantizedLayer:
    """The layer as it is for one tensor: the range of its input found, its bias at that scale.

    The bias is an integer in float32, q_b = round(b / (s_w·s_x)), which a small range of the input
    may take beyond int32.

    Args:
      operation: the linear operation.
      layer: its parameters.
      x: float[...], its input; all of it shares a range, whatever the granularity.

    Returns:
      The layer itself unless its input is `Dynamic`.
    """
    if not isinstance(layer.inputs, Dynamic):
        return layer
    inputs = dataclasses.replace(layer.inputs, axis=None).at(x)
    found = dataclasses.replace(layer, inputs=inputs)
    if not found.has_integer_accumulator:
        return found
    inverse = 1 / accumulator_scale(operation, found)
    return dataclasses.replace(found, bias=jnp.round(layer.bias * inverse))


def by_example(
    operation: Linear,
    layer: QuantizedLayer,
    function: Callable[[QuantizedLayer, jax.Array], jax.Array],
    x: jax.Array,
) -> jax.Array:
    """Applies a layer to the whole of an input, or to one example after the other.

    Args:
      operation: the linear operation.
      layer: its parameters, the input `Dynamic`.
      function: of (the layer as it is for a tensor, that tensor): an output of the operation.
      x: float[...], the input.
    """
    assert isinstance(layer.inputs, Dynamic)
    axis = layer.inputs.axis
    if axis is None:
        return function(at_input(operation, layer, x), x)
    to = _output_axis(operation, axis, x)

    def of_one(example: jax.Array) -> jax.Array:
        example = jnp.expand_dims(example, axis)
        return jnp.squeeze(function(at_input(operation, layer, example), example), to)

    return jax.vmap(of_one, axis, to)(x)


def _output_axis(operation: Linear, axis: int, x: jax.Array) -> int:
    """Where an axis of the input stands in the output: what grows with it."""
    one, two = (
        shape_of_output(operation, (*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in (1, 2)
    )
    grown = enumerate(zip(one, two, strict=True))
    [found] = (position for position, (before, after) in grown if before != after)
    return found


def apply_linear(
    operation: Linear, layer: QuantizedLayer, x: jax.Array, add_up: SumOfSigns = sum_of_signs
) -> jax.Array:
    """Evaluates a layer up to its output, before that is quantized.

    The products are taken between codes and the sum is scaled once:
    y = s_w·s_x·((q_w − z_w) * (q_x − z_x) + q_b). Float32 holds the integers up to 2^24 exactly, so
    this is what integer arithmetic gives.

    Args:
      operation: the linear operation.
      layer: its parameters.
      x: float[...], the layer's input in real units.
      add_up: how a sum over signs is taken, where the input is read as signs.

    Returns:
      float32[...], the output in real units.

    References:
      Jacob et al., 2018, arXiv:1712.05877, eq. 3.
    """
    if isinstance(layer.inputs, Dynamic):
        return by_example(operation, layer, lambda at, x: apply_linear(operation, at, x), x)
    acc, scale = _accumulate(operation, layer, x, add_up)
    if layer.has_integer_accumulator:
        return acc * scale
    if isinstance(layer.inputs, Signs):
        return _rounded_product(acc, scale) + along_channels(operation, layer.bias, acc.ndim)
    return acc * scale + along_channels(operation, layer.bias, acc.ndim)


def _rounded_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a·b, rounded before anything is added to it: no compiler makes one operation of both."""
    limit = jnp.finfo(jnp.float32).max
    return jnp.clip(a * b, -limit, limit)


def _accumulate(
    operation: Linear, layer: QuantizedLayer, x: jax.Array, add_up: SumOfSigns = sum_of_signs
) -> tuple[jax.Array, jax.Array]:
    """Sums the products, and an integer bias: (sum, the real value of one unit of it)."""
    assert not isinstance(layer.inputs, Dynamic)
    if isinstance(layer.inputs, Signs):
        left, centered = center(operation, layer.inputs, x)
        acc = add_up(left, layer.kernel, centered).astype(jnp.float32)
        scale = along_channels(operation, accumulator_scale(operation, layer), acc.ndim)
        return acc, _rounded_product(scale, magnitudes(left, centered))
    x = x.astype(jnp.float32) if layer.grid is None else float_codes(x, layer.grid)
    kernel = relative_codes(layer) if layer.has_scale_per_sum else scaled_kernel(layer)
    acc = operation.evaluate(x, operation.from_matrix(kernel))
    if layer.has_integer_accumulator:
        acc = acc + along_channels(operation, layer.bias.astype(jnp.float32), acc.ndim)
    return acc, along_channels(operation, accumulator_scale(operation, layer), acc.ndim)


def apply_layer(operation: Linear, layer: QuantizedLayer, x: jax.Array) -> jax.Array:
    """Evaluates a layer up to its quantized pre-activation output.

    An integer accumulator is multiplied by M = s_w·s_x / s_y and rounded, which is what the integer
    evaluation does to it (see `qjax.integer.requantize`).

    Args:
      operation: the linear operation.
      layer: its parameters.
      x: float[...], the layer's input in real units.

    Returns:
      float32[...], the dequantized output.
    """
    if layer.outputs is None:
        return apply_linear(operation, layer, x)
    if not layer.has_integer_accumulator or isinstance(layer.outputs, Dynamic):
        return layer.outputs.project(apply_linear(operation, layer, x))
    acc, scale = _accumulate(operation, layer, x)
    codes = round_codes(acc * (scale * layer.outputs.inverse_scale), layer.outputs)
    return layer.outputs.scale * codes
