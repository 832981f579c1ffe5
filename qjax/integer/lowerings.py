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

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import QParams
from qjax.formats.dynamic import ActivationFormat, Dynamic
from qjax.graph.operation import Linear, along_channels, from_output_matrix
from qjax.run.layer import QuantizedLayer

_logger = logging.getLogger(__name__)

FLOAT_LIMIT = 2**24  # float32 holds every integer up to here
INT_LIMIT = 2**31
_MOST_SLICES = 16


class Operands(NamedTuple):
    """What a lowering takes of a layer's parameters.

    Attributes:
      kernel: integers q_w − z_w, int8 where they fit, in the operation's own layout; for `dot`
        [groups, patch, channels].
      bias: int32[groups * channels], the zero-point correction folded in where there is one.
    """

    kernel: jax.Array
    bias: jax.Array


class Method(NamedTuple):
    """A way to compute accumulators.

    Attributes:
      name: in `LOWERINGS`.
      only_integers: whether it computes with integers alone.
      lower: of (operation, the layer's parameters, not traced): how it computes that layer; None
        where it would not be exact.
      operands: of (operation, the layer's parameters, bias from `folded_bias`).
      accumulate: of (operation, operands, input codes, their code of 0, lowering).
    """

    name: str
    only_integers: bool
    lower: Callable[[Linear, QuantizedLayer], "Lowering | None"]
    operands: Callable[[Linear, QuantizedLayer, jax.Array], Operands]
    accumulate: Callable[[Linear, Operands, jax.Array, jax.Array, "Lowering"], jax.Array]

    def __repr__(self) -> str:
        return self.name


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


def signed(qparams: QParams) -> QParams:
    """The same grid with codes stored around 0, unsigned ones less 2^(b−1): 8 bits fit int8."""
    if qparams.is_signed:
        return qparams
    low, high = (jnp.asarray(limit, jnp.int32) for limit in (qparams.qmin, qparams.qmax))
    offset = (high - low + 1) // 2
    dtype = np.dtype(f"int{8 * np.dtype(qparams.dtype).itemsize}")
    return QParams(qparams.scale, qparams.zero_point - offset, low - offset, high - offset, dtype)


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
    kernel = integer_kernel(layer) if kernel is None else kernel
    low, high = _relative_range(layer.inputs)
    positive, negative = np.maximum(kernel, 0).sum(-2), np.minimum(kernel, 0).sum(-2)
    return positive * low + negative * high, positive * high + negative * low


def _relative_range(inputs: ActivationFormat | None) -> tuple[int, int]:
    """The least and the greatest code that an input can have, less its zero point."""
    assert inputs is not None
    qmin, qmax = int(inputs.qmin), int(inputs.qmax)
    if isinstance(inputs, Dynamic):  # with any zero point
        return (qmin, qmax) if inputs.spec.symmetric else (qmin - qmax, qmax - qmin)
    return qmin - int(inputs.zero_point), qmax - int(inputs.zero_point)


def largest(layer: QuantizedLayer) -> int:
    """The greatest magnitude that the accumulator can have, the bias before or after the sum.

    Where the range of the input is found at run time, the bias is no part of it.
    """
    low, high = worst_case(layer)
    if layer.sums_dynamic_codes:
        return max(-int(low.min()), int(high.max()))
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
    if method is None:
        return _fastest(operation, layer, platform, only_integers)
    lowering = method.lower(operation, layer)
    if lowering is None:
        raise ValueError(
            "its sums can leave the integers that float32 holds, even in slices; use the lowering "
            "`int8` or `dot`"
        )
    return lowering


def _fastest(
    operation: Linear, layer: QuantizedLayer, platform: str, only_integers: bool
) -> Lowering:
    """The fastest lowering that is exact, and of integers alone where it has to be."""
    method = _measured(operation, layer, platform)
    if method is INT8 and platform != "cpu" and not operation.is_product:
        method = INT8 if are_exact(operation.matrix_shape[0] > 1) else DOT
    may = method.only_integers or not only_integers
    lowering = method.lower(operation, layer) if may else None
    if lowering is None:
        return Lowering(DOT if operation.matrix_shape[0] == 1 else INT8)
    return lowering


@functools.cache
def are_exact(are_grouped: bool) -> bool:
    """Whether this device's convolutions of int8 give the right sums, on a small layer.

    Grouped ones gave wrong values on a GPU (openxla/xla#49123). Each process asks once.

    Args:
      are_grouped: whether to try convolutions of several groups.
    """
    with jax.ensure_compile_time_eval():
        rng = np.random.default_rng(0)
        groups = 4 if are_grouped else 1
        shapes = {"input": (2, 9, 9, 32), "kernel": (3, 3, 32 // groups, 32)}
        x, kernel = (rng.integers(-127, 128, shape, np.int8) for shape in shapes.values())
        exact = _convolved(x.astype(np.float32), kernel.astype(np.float32), groups, jnp.float32)
        found = _convolved(x, kernel, groups, jnp.int32)
        is_exact = bool(np.array_equal(np.asarray(exact).astype(np.int64), np.asarray(found)))
    if not is_exact:
        _logger.warning(
            "convolutions of int8%s give wrong sums on this device; they are computed as products "
            "of matrices.",
            " in groups" if are_grouped else "",
        )
    return is_exact


def _convolved(x: Any, kernel: Any, groups: int, dtype: Any) -> jax.Array:
    """A convolution whose sums, below 2^24, float32 holds."""
    return lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        *((1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def _measured(operation: Linear, layer: QuantizedLayer, platform: str) -> Method:
    """The table: measured on Zen 3 with `scripts/benchmark.py lowerings`."""
    assert layer.weights is not None and layer.inputs is not None
    if platform != "cpu":
        return INT8
    groups, patch, channels = operation.matrix_shape
    widest = max(layer.weights.bits, layer.inputs.bits)
    if groups > 1 or widest > 8 or not layer.weights.is_signed:
        return FLOAT32
    if operation.is_product:
        return INT8
    if patch <= 32:
        return DOT
    axes = operation.reduced_axes
    inputs = operation.kernel_shape[axes[1]] if axes is not None else 1
    return INT8 if inputs % 32 == 0 and channels % 32 == 0 else FLOAT32


def _lower_to_float(operation: Linear, layer: QuantizedLayer) -> Lowering | None:
    """The lowering to float32, in as few slices as are exact."""
    slices = _slices(operation, layer)
    if slices is None:
        return None
    return Lowering(FLOAT32, slices, slices == 1 and largest(layer) < FLOAT_LIMIT)


def _slices(operation: Linear, layer: QuantizedLayer) -> int | None:
    """The least power of two of slices whose sums stay below 2^24; None if there is none."""
    kernel = integer_kernel(layer)
    size, axis = kernel.shape[1], operation.reduced_axes
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


def _relative_kernel(layer: QuantizedLayer) -> jax.Array:
    assert layer.weights is not None
    if layer.weights.is_signed:
        return layer.kernel
    wider = jnp.int16 if np.dtype(layer.weights.dtype).itemsize == 1 else jnp.int32
    return layer.kernel.astype(wider) - layer.weights.zero_point.astype(wider)


def folded_bias(layer: QuantizedLayer) -> jax.Array:
    """The bias with the zero-point correction, q_b − z_x·Σ q_w: int32[groups * channels].

    z_x is that of the codes as they are stored, see `signed`.
    """
    assert layer.grid is not None
    total = jnp.sum(_relative_kernel(layer), axis=1, dtype=jnp.int32).reshape(-1)
    return layer.bias - signed(layer.grid).zero_point * total


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
    return lowering.method.operands(operation, layer, folded)


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
    return lowering.method.accumulate(operation, given, x, zero_point, lowering)


# ---- The operation itself, and products of matrices, on integers

Product = Callable[[Linear, jax.Array, jax.Array], jax.Array]


def _integer_method(
    name: str, lay_out: Callable[[Linear, jax.Array], jax.Array], product: Product
) -> Method:
    """A method on integers: every layer, zero points folded into the bias.

    Args:
      name: of the method.
      lay_out: of (operation, float[groups, patch, channels]): the kernel that `product` takes.
      product: of (operation without padding, input, kernel): the sums, int32[...].
    """

    def lower(operation: Linear, layer: QuantizedLayer) -> Lowering:
        return Lowering(method)

    def operands(operation: Linear, layer: QuantizedLayer, folded: jax.Array) -> Operands:
        return Operands(lay_out(operation, _relative_kernel(layer)), folded)

    def accumulate(
        operation: Linear, given: Operands, x: jax.Array, zero_point: jax.Array, lowering: Lowering
    ) -> jax.Array:
        common = np.promote_types(x.dtype, given.kernel.dtype)
        unpadded, x = operation.padded(x.astype(common), zero_point)
        acc = product(unpadded, x, given.kernel.astype(common))
        return acc + along_channels(unpadded, given.bias, acc.ndim)

    method = Method(name, True, lower, operands, accumulate)
    return method


def _from_matrix(operation: Linear, kernel: jax.Array) -> jax.Array:
    return operation.from_matrix(kernel)


def _apply(operation: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return operation.apply(x, kernel, preferred_element_type=jnp.int32)


def _matrix(operation: Linear, kernel: jax.Array) -> jax.Array:
    return kernel


def _multiply(operation: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The operation as one product of matrices per group."""
    if operation.is_product:
        return _apply(operation, x, operation.from_matrix(kernel))
    shape = output_shape(operation, x, kernel)
    acc = lax.dot_general(
        operation.patches(x),
        kernel,
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.int32,
    )
    return from_output_matrix(operation, acc.transpose(1, 0, 2), shape)


def output_shape(operation: Linear, x: jax.Array, kernel: jax.Array) -> tuple[int, ...]:
    """The shape of an operation's output, of an input and a kernel [groups, patch, channels]."""

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return operation.apply(x, operation.from_matrix(kernel))

    return jax.eval_shape(apply, x, kernel).shape


# ---- The operation itself, in float32


def _float_operands(operation: Linear, layer: QuantizedLayer, folded: jax.Array) -> Operands:
    return Operands(operation.from_matrix(_relative_kernel(layer)), layer.bias)


def _accumulate_float(
    operation: Linear, given: Operands, x: jax.Array, zero_point: jax.Array, lowering: Lowering
) -> jax.Array:
    values = x.astype(jnp.float32) - zero_point.astype(jnp.float32)
    kernel = given.kernel.astype(jnp.float32)
    bias = given.bias.astype(jnp.float32) if lowering.stays_float else given.bias
    pairs = [(values, kernel)]
    if lowering.slices > 1:
        axes = operation.reduced_axes
        assert axes is not None
        sliced = (
            jnp.split(array, lowering.slices, axis)
            for array, axis in zip((values, kernel), axes, strict=True)
        )
        pairs = list(zip(*sliced, strict=True))
    parts = [operation.evaluate(*pair) for pair in pairs]
    if not lowering.stays_float:
        parts = [part.astype(jnp.int32) for part in parts]
    acc = sum(parts[1:], parts[0])
    return acc + along_channels(operation, bias, acc.ndim)


INT8 = _integer_method("int8", _from_matrix, _apply)
DOT = _integer_method("dot", _matrix, _multiply)
FLOAT32 = Method("float32", False, _lower_to_float, _float_operands, _accumulate_float)

LOWERINGS: dict[str, Method] = {method.name: method for method in (INT8, DOT, FLOAT32)}
