"""Exact ways to compute a layer's accumulator, acc = q_b + Σ q_w·(q_x − z_x), from its codes.

| lowering | operands | exact |
|---|---|---|
| `int8` | the operation itself on int8 (int16 for wider codes), summed in int32 | always |
| `dot` | patches of the input times the kernel matrix, int8 (int16), summed in int32 | always |
| `float32` | the operation itself on integers in float32 | where Σ stays below 2^24 |

The first two take q_x as it is stored, pad with z_x and fold −z_x·Σ q_w into the bias; the third
subtracts z_x first. `float32` cuts the input channels into as many slices as it takes for the sum
over each, in any order, to stay below 2^24, where float32 holds every integer; slices are added in
int32. So all of them give the same accumulator, bit for bit.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import QParams
from qjax.graph.operation import Convolution, DotProduct, Linear, along_channels, from_output_matrix
from qjax.run.layer import QuantizedLayer

Method = Literal["int8", "dot", "float32"]

FLOAT_LIMIT = 2**24  # float32 holds every integer up to here
INT_LIMIT = 2**31
_MOST_SLICES = 16


class Lowering(NamedTuple):
    """How a layer's accumulator is computed.

    Attributes:
      method: see the module.
      slices: into which `float32` cuts the input channels.
      stays_float: whether acc, bias included, is below 2^24, so that it need not leave float32.
    """

    method: Method
    slices: int = 1
    stays_float: bool = False


class Operands(NamedTuple):
    """What a lowering takes of a layer's parameters.

    Attributes:
      kernel: integers q_w − z_w, int8 where they fit, in the operation's own layout; for `dot`
        [groups, patch, channels].
      bias: int32[groups * channels], the zero-point correction folded in where there is one.
    """

    kernel: jax.Array
    bias: jax.Array


def signed(qparams: QParams) -> QParams:
    """The same grid with codes stored around 0, unsigned ones less 2^(b−1): 8 bits fit int8."""
    if qparams.qmin < 0:
        return qparams
    offset = 2 ** (qparams.bits - 1)
    zero_point = qparams.zero_point - offset
    return QParams(qparams.scale, zero_point, qparams.qmin - offset, qparams.qmax - offset)


def integer_kernel(layer: QuantizedLayer) -> np.ndarray:
    """The kernel's codes less their zero points, int64[groups, patch, channels]."""
    assert layer.weights is not None
    zero_point = np.asarray(layer.weights.zero_point, np.int64)
    return np.asarray(layer.kernel, np.int64) - zero_point


def worst_case(layer: QuantizedLayer, kernel: np.ndarray | None = None) -> tuple[Any, Any]:
    """The least and the greatest sum Σ q_w·(q_x − z_x) that any input can cause, without the bias.

    The sum over any subset of the products lies between the two as well.

    Args:
      layer: a layer with an integer accumulator.
      kernel: int64[..., patch, channels], its kernel or a part of it; by default all of it.

    Returns:
      (low, high), int64[..., channels].
    """
    assert layer.inputs is not None
    kernel = integer_kernel(layer) if kernel is None else kernel
    zero_point = int(layer.inputs.zero_point)
    low, high = layer.inputs.qmin - zero_point, layer.inputs.qmax - zero_point
    positive, negative = np.maximum(kernel, 0).sum(-2), np.minimum(kernel, 0).sum(-2)
    return positive * low + negative * high, positive * high + negative * low


def largest(layer: QuantizedLayer) -> int:
    """The greatest magnitude that the accumulator can have, the bias before or after the sum."""
    low, high = worst_case(layer)
    bias = np.asarray(layer.bias, np.int64).reshape(low.shape)
    return max(-int((low + np.minimum(bias, 0)).min()), int((high + np.maximum(bias, 0)).max()))


def choose(
    operation: Linear,
    layer: QuantizedLayer,
    method: Method | None,
    platform: str,
    only_integers: bool = False,
) -> Lowering:
    """Chooses the lowering of a layer.

    Args:
      operation: its linear operation.
      layer: its parameters, not traced.
      method: the lowering that was asked for; None for the fastest, by a table that was measured
        on x86-64 CPUs (other platforms get `int8`).
      platform: of the device, e.g. `cpu`.
      only_integers: whether the table must do without `float32`.

    Raises:
      ValueError: `float32` was asked for and would not be exact.
    """
    slices = _slices(operation, layer)
    if method is None:
        method = _fastest(operation, layer, platform)
        if method == "float32" and (slices is None or only_integers):
            method = "dot" if operation.matrix_shape[0] == 1 else "int8"
    if method != "float32":
        return Lowering(method)
    if slices is None:
        raise ValueError(
            "its sums can leave the integers that float32 holds, even in slices; use the lowering "
            "`int8` or `dot`"
        )
    return Lowering("float32", slices, slices == 1 and largest(layer) < FLOAT_LIMIT)


def _fastest(operation: Linear, layer: QuantizedLayer, platform: str) -> Method:
    """The table: measured on Zen 3 with `scripts/benchmark.py lowerings`."""
    assert layer.weights is not None and layer.inputs is not None
    if platform != "cpu":
        return "int8"
    groups, patch, channels = operation.matrix_shape
    if groups > 1 or max(layer.weights.bits, layer.inputs.bits) > 8 or layer.weights.qmin >= 0:
        return "float32"
    if isinstance(operation, DotProduct):
        return "int8"
    if patch <= 32:
        return "dot"
    inputs = operation.kernel_shape[operation.dimension_numbers.rhs_spec[1]]
    return "int8" if inputs % 32 == 0 and channels % 32 == 0 else "float32"


def _slices(operation: Linear, layer: QuantizedLayer) -> int | None:
    """The least power of two of slices whose sums stay below 2^24; None if there is none."""
    kernel = integer_kernel(layer)
    size, axis = kernel.shape[1], _sliced_axes(operation)
    if axis is not None:
        size = operation.kernel_shape[axis[1]]
    for count in (2**i for i in range(_MOST_SLICES.bit_length())):
        if size % count or (count > 1 and axis is None):
            return None
        # The input channels are the fastest axis of a patch.
        parts = kernel.reshape(kernel.shape[0], -1, count, size // count, kernel.shape[2])
        parts = parts.transpose(2, 0, 1, 3, 4).reshape(count, kernel.shape[0], -1, kernel.shape[2])
        low, high = worst_case(layer, parts)
        if max(-low.min(), high.max()) < FLOAT_LIMIT:
            return count
    return None


def _sliced_axes(operation: Linear) -> tuple[int, int] | None:
    """The axis of the input channels in (input, kernel), None where there is not just one."""
    if isinstance(operation, Convolution):
        numbers = operation.dimension_numbers
        return None if operation.groups > 1 else (numbers.lhs_spec[1], numbers.rhs_spec[1])
    (x_axes, kernel_axes) = operation.contracting
    return (x_axes[0], kernel_axes[0]) if len(x_axes) == 1 and not operation.batch[0] else None


def _relative_kernel(layer: QuantizedLayer) -> jax.Array:
    assert layer.weights is not None
    if layer.weights.qmin < 0:
        return layer.kernel
    wider = jnp.int16 if layer.weights.bits <= 8 else jnp.int32
    return layer.kernel.astype(wider) - layer.weights.zero_point.astype(wider)


def folded_bias(layer: QuantizedLayer) -> jax.Array:
    """The bias with the zero-point correction, q_b − z_x·Σ q_w: int32[groups * channels].

    z_x is that of the codes as they are stored, see `signed`.
    """
    assert layer.inputs is not None
    total = jnp.sum(_relative_kernel(layer), axis=1, dtype=jnp.int32).reshape(-1)
    return layer.bias - signed(layer.inputs).zero_point * total


def operands(
    operation: Linear, layer: QuantizedLayer, folded: jax.Array, lowering: Lowering
) -> Operands:
    """What a lowering takes of a layer's parameters.

    Args:
      operation: its linear operation.
      layer: its parameters.
      folded: from `folded_bias`.
      lowering: how the accumulator is computed.
    """
    kernel = _relative_kernel(layer)
    kernel = kernel if lowering.method == "dot" else operation.from_matrix(kernel)
    return Operands(kernel, layer.bias if lowering.method == "float32" else folded)


def accumulate(
    operation: Linear, given: Operands, x: jax.Array, zero_point: jax.Array, lowering: Lowering
) -> jax.Array:
    """Computes a layer's accumulator, bias included.

    Args:
      operation: its linear operation.
      given: from `operands`, with the same lowering.
      x: int[...], codes of its input.
      zero_point: int32, their code of 0.
      lowering: how.

    Returns:
      int32[...] in the layout of the operation's output; float32[...] of the same integers where
      `lowering.stays_float`.
    """
    if lowering.method == "float32":
        return _accumulate_float(operation, given, x, zero_point, lowering)
    kernel = given.kernel
    common = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(common), kernel.astype(common)
    operation, x = _padded(operation, x, zero_point)
    if lowering.method == "dot":
        acc = _dot(operation, x, kernel)
    else:
        acc = operation.apply(x, kernel, preferred_element_type=jnp.int32)
    return acc + along_channels(operation, given.bias, acc.ndim)


def _accumulate_float(
    operation: Linear, given: Operands, x: jax.Array, zero_point: jax.Array, lowering: Lowering
) -> jax.Array:
    values = x.astype(jnp.float32) - zero_point.astype(jnp.float32)
    kernel = given.kernel.astype(jnp.float32)
    bias = given.bias.astype(jnp.float32) if lowering.stays_float else given.bias
    pairs = [(values, kernel)]
    if lowering.slices > 1:
        axes = _sliced_axes(operation)
        assert axes is not None
        pairs = list(
            zip(
                *(
                    jnp.split(array, lowering.slices, axis)
                    for array, axis in zip((values, kernel), axes, strict=True)
                ),
                strict=True,
            )
        )
    precision = lax.Precision.HIGHEST
    parts = [operation.apply(*pair, precision=precision) for pair in pairs]
    if not lowering.stays_float:
        parts = [part.astype(jnp.int32) for part in parts]
    acc = sum(parts[1:], parts[0])
    return acc + along_channels(operation, bias, acc.ndim)


def _padded(operation: Linear, x: jax.Array, zero_point: jax.Array) -> tuple[Linear, jax.Array]:
    """Pads and dilates a convolution's input with the code of 0: (what is left to do, input)."""
    if not isinstance(operation, Convolution):
        return operation, x
    edges = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(operation.padding, operation.lhs_dilation, strict=True)
    ]
    rank = len(edges)
    unpadded = dataclasses.replace(operation, padding=((0, 0),) * rank, lhs_dilation=(1,) * rank)
    config = [(0, 0, 0)] * x.ndim
    for axis, edge in zip(operation.dimension_numbers.lhs_spec[2:], edges, strict=True):
        config[axis] = edge
    if not any(map(any, config)):
        return unpadded, x
    return unpadded, lax.pad(x, zero_point.astype(x.dtype), config)


def _dot(operation: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The operation as one product of matrices per group."""
    if isinstance(operation, DotProduct):
        kernel = operation.from_matrix(kernel)
        return operation.apply(x, kernel, preferred_element_type=jnp.int32)
    shape = jax.eval_shape(
        lambda x, kernel: operation.apply(x, operation.from_matrix(kernel)), x, kernel
    ).shape
    patches = operation.patches(x)
    acc = lax.dot_general(
        patches, kernel, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32
    )
    return from_output_matrix(operation, acc.transpose(1, 0, 2), shape)
