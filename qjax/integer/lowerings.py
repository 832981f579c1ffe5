"""Exact ways to compute a layer's accumulator, acc = q_b + Σ q_w·(q_x − z_x), from its codes.

| lowering | operands | exact |
|---|---|---|
| `int8` | the operation itself on int8 (int16 for wider codes), summed in int32 | always |
| `dot` | patches of the input times the kernel matrix, int8 (int16), summed in int32 | always |
| `uint8` | the same, codes of the input as uint8 | 8 bits, on a CPU |
| `pairs` | the same, two columns of the output at a time | of convolutions whose columns overlap |
| `float32` | the operation itself on integers in float32 | where Σ stays below 2^24 |

The first two take q_x as it is stored, pad with z_x and fold −z_x·Σ q_w into the bias. `uint8` and
`pairs` do so with q_x + 128 and z_x + 128: the int8 dot instructions of x86-64 (VNNI, AMX) multiply
unsigned bytes by signed ones, and XLA uses them where the operands are of these types. `pairs` is
told in `qjax.integer.pairs`. `float32` subtracts z_x first. It cuts the input channels into as many
slices as it takes for the sum over each, in any order, to stay below 2^24, where float32 holds
every integer; slices are added in int32. So all of them give the same accumulator, bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import QParams
from qjax.formats.dynamic import ActivationFormat, Dynamic
from qjax.graph.operation import Linear, along_channels
from qjax.integer.pairs import has_pairs, kernel_of_pairs, multiply_pairs
from qjax.integer.processor import dot_extension
from qjax.integer.products import multiply
from qjax.integer.trial import are_exact
from qjax.run.layer import QuantizedLayer

FLOAT_LIMIT = 2**24  # float32 holds every integer up to here
INT_LIMIT = 2**31
_MOST_SLICES = 16


class Operands(NamedTuple):
    """What a lowering takes of a layer's parameters.

    Attributes:
      kernel: integers q_w − z_w, int8 where they fit, in the operation's own layout; a matrix
        [groups, patch, channels] where patches are cut.
      bias: int32[groups * channels], the zero-point correction folded in where there is one.
    """

    kernel: jax.Array
    bias: jax.Array


class Method(NamedTuple):
    """A way to compute accumulators.

    Attributes:
      name: in `LOWERINGS`.
      only_integers: whether it computes with integers alone.
      condition: what a layer fails that it cannot compute, as the reason in a message.
      lower: of (operation, the layer's parameters, not traced): how it computes that layer; None
        where it cannot, or not exactly.
      operands: of (operation, the layer's parameters, bias from `folded_bias`).
      accumulate: of (operation, operands, input codes, their code of 0, lowering).
      offset: what it adds to the stored codes of the input.
      cuts_patches: whether it holds the patches of an input.
      lays_out: whether its kernel is worth laying out once per params.
      is_portable: whether all that read StableHLO compute it as XLA does.
    """

    name: str
    only_integers: bool
    condition: str
    lower: Callable[[Linear, QuantizedLayer], "Lowering | None"]
    operands: Callable[[Linear, QuantizedLayer, jax.Array], Operands]
    accumulate: Callable[[Linear, Operands, jax.Array, jax.Array, "Lowering"], jax.Array]
    offset: int = 0
    cuts_patches: bool = False
    lays_out: bool = False
    is_portable: bool = True

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


class Row(NamedTuple):
    """A row of a table of the fastest lowerings: a method, and the layers that it is for.

    Attributes:
      method: the fastest for them.
      groups: the least and the greatest number of groups.
      patch: the least and the greatest number of elements of a patch.
      multiple: what the numbers of input and output channels are multiples of.
      most_channels: the greatest number of input and of output channels.
      products: whether it is for products of matrices alone.
      is_pointwise: whether it is for layers that read one position at a time alone.
      bits: the greatest width of the factors, codes of the input and weights less zero points.
      is_tried: whether it is for convolutions that this device computes right, see `are_exact`.
    """

    method: Method
    groups: tuple[float, float] = (1, math.inf)
    patch: tuple[float, float] = (1, math.inf)
    multiple: int = 1
    most_channels: float = math.inf
    products: bool = False
    is_pointwise: bool = False
    bits: float = math.inf
    is_tried: bool = False

    def holds(self, operation: Linear, layer: QuantizedLayer) -> bool:
        """Whether a layer is one that the row is for."""
        assert layer.weights is not None and layer.inputs is not None
        bits = max(layer.inputs.bits, layer.weights.bits + (not layer.weights.is_signed))
        groups, patch, channels = operation.matrix_shape
        axes = operation.reduced_axes
        inputs = 1 if axes is None else operation.kernel_shape[axes[1]]
        return (
            self.groups[0] <= groups <= self.groups[1]
            and self.patch[0] <= patch <= self.patch[1]
            and (patch == inputs or not self.is_pointwise)
            and inputs % self.multiple == channels % self.multiple == 0
            and max(inputs, channels) <= self.most_channels
            and (operation.is_product or not self.products)
            and bits <= self.bits
            and (operation.is_product or not self.is_tried or are_exact(groups > 1))
        )


def signed(qparams: QParams) -> QParams:
    """The same grid with codes stored around 0, unsigned ones less 2^(b−1): 8 bits fit int8."""
    if qparams.is_signed:
        return qparams
    low, high = (jnp.asarray(limit, jnp.int32) for limit in (qparams.qmin, qparams.qmax))
    offset = (high - low + 1) >> 1
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
    table: Sequence[Row],
    only_integers: bool = False,
) -> Lowering:
    """Chooses the lowering of a layer.

    Args:
      operation: its linear operation.
      layer: its parameters, not traced.
      method: the lowering that was asked for; None for the fastest.
      table: of the fastest, from `fastest_on`.
      only_integers: whether the table must do without `float32`.

    Raises:
      ValueError: the lowering that was asked for cannot compute the layer, or not exactly.
    """
    if method is None:
        return _fastest(operation, layer, table, only_integers)
    lowering = method.lower(operation, layer)
    if lowering is None:
        raise ValueError(f"{method.condition}; use the lowering `int8` or `dot`")
    return lowering


def _fastest(
    operation: Linear, layer: QuantizedLayer, table: Sequence[Row], only_integers: bool
) -> Lowering:
    """The first of the table that is exact, and of integers alone where it has to be."""
    for row in table:
        may = row.method.only_integers or not only_integers
        lowering = (
            row.method.lower(operation, layer) if may and row.holds(operation, layer) else None
        )
        if lowering is not None:
            return lowering
    return Lowering(DOT if operation.matrix_shape[0] == 1 else INT8)


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


def folded_bias(layer: QuantizedLayer, method: Method) -> jax.Array:
    """The bias with the zero-point correction, q_b − z_x·Σ q_w: int32[groups * channels].

    z_x is that of the codes as the method takes them: as they are stored, see `signed`, and its
    offset.
    """
    assert layer.grid is not None
    total = jnp.sum(_relative_kernel(layer), axis=1, dtype=jnp.int32).reshape(-1)
    return layer.bias - (signed(layer.grid).zero_point + method.offset) * total


def operands(
    operation: Linear,
    layer: QuantizedLayer,
    folded: jax.Array,
    lowering: Lowering,
    kernel: jax.Array | None = None,
) -> Operands:
    """What a lowering takes of a layer's parameters.

    Args:
      operation: its linear operation.
      layer: its parameters.
      folded: from `folded_bias`, of the lowering's method.
      lowering: how the accumulator is computed.
      kernel: as the method takes it, where it was laid out before.
    """
    if kernel is not None:
        return Operands(kernel, folded)
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
    name: str, lay_out: Callable[[Linear, jax.Array], jax.Array], product: Product, **fields: Any
) -> Method:
    """A method on integers: every layer, zero points folded into the bias.

    Args:
      name: of the method.
      lay_out: of (operation, float[groups, patch, channels]): the kernel that `product` takes.
      product: of (operation without padding, input, kernel): the sums, int32[...].
      **fields: of the method.
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

    method = Method(name, True, "", lower, operands, accumulate, **fields)
    return method


def _from_matrix(operation: Linear, kernel: jax.Array) -> jax.Array:
    return operation.from_matrix(kernel)


def _apply(operation: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return operation.apply(x, kernel, preferred_element_type=jnp.int32)


def _matrix(operation: Linear, kernel: jax.Array) -> jax.Array:
    return kernel


# ---- Products of unsigned codes and signed ones

_UNSIGNED = 128  # what makes stored codes of 8 bits unsigned


def _lower_to_unsigned(operation: Linear, layer: QuantizedLayer) -> Lowering | None:
    """The lowering to uint8, where all are bytes."""
    assert layer.weights is not None and layer.inputs is not None
    are_bytes = max(layer.weights.bits, layer.inputs.bits) <= 8 and layer.weights.is_signed
    is_cpu = jax.default_backend() == "cpu"
    return Lowering(UINT8) if are_bytes and is_cpu else None


def _kernel_operands(operation: Linear, layer: QuantizedLayer, folded: jax.Array) -> Operands:
    return Operands(layer.kernel, folded)


def _accumulate_unsigned(
    operation: Linear, given: Operands, x: jax.Array, zero_point: jax.Array, lowering: Lowering
) -> jax.Array:
    unpadded, unsigned = operation.padded(_unsigned(x), zero_point + _UNSIGNED)
    acc = multiply(unpadded, unsigned, given.kernel)
    return acc + along_channels(unpadded, given.bias, acc.ndim)


def _unsigned(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.uint8) + jnp.uint8(_UNSIGNED)


def _lower_to_pairs(operation: Linear, layer: QuantizedLayer) -> Lowering | None:
    """The lowering to pairs, where `uint8` computes the layer and it has some."""
    has_some = has_pairs(operation) and _lower_to_unsigned(operation, layer) is not None
    return Lowering(PAIRS) if has_some else None


def _pairs_operands(operation: Linear, layer: QuantizedLayer, folded: jax.Array) -> Operands:
    assert has_pairs(operation)
    return Operands(kernel_of_pairs(operation, layer.kernel), folded)


def _accumulate_pairs(
    operation: Linear, given: Operands, x: jax.Array, zero_point: jax.Array, lowering: Lowering
) -> jax.Array:
    assert has_pairs(operation)
    zero = zero_point + _UNSIGNED
    acc = multiply_pairs(operation, _unsigned(x), zero, given.kernel)
    return acc + along_channels(operation, given.bias, acc.ndim)


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
DOT = _integer_method("dot", _matrix, multiply, cuts_patches=True)
UINT8 = Method(
    "uint8",
    True,
    "it takes a CPU, codes of at most 8 bits, and signed ones of the weights",
    _lower_to_unsigned,
    _kernel_operands,
    _accumulate_unsigned,
    offset=_UNSIGNED,
    cuts_patches=True,
    is_portable=False,  # IREE takes unsigned operands of products for signed ones
)
PAIRS = Method(
    "pairs",
    True,
    "it takes what `uint8` takes, and a convolution of one group, without strides along columns",
    _lower_to_pairs,
    _pairs_operands,
    _accumulate_pairs,
    offset=_UNSIGNED,
    cuts_patches=True,
    lays_out=True,
    is_portable=False,
)
FLOAT32 = Method(
    "float32",
    False,
    "its sums can leave the integers that float32 holds, even in slices",
    _lower_to_float,
    _float_operands,
    _accumulate_float,
)

LOWERINGS: dict[str, Method] = {
    method.name: method for method in (INT8, DOT, UINT8, PAIRS, FLOAT32)
}

ALWAYS = (Row(INT8, is_tried=True), Row(DOT))

_BYTES = (
    Row(UINT8, groups=(1, 1)),
    Row(DOT, groups=(1, 1), bits=8, products=True),
    Row(INT8, groups=(1, 1), bits=8, multiple=32),
    Row(FLOAT32),
)
# The fastest of a layer, the first row that holds. Measured with `scripts/benchmark.py lowerings`.
FASTEST: dict[str, tuple[Row, ...]] = {
    # Emerald Rapids
    "cpu with AMX": (Row(PAIRS, most_channels=64), *_BYTES),
    # Zen 4; that pairs are faster there has not been measured. Products with 64 channels take four
    # times as long as cutting their patches.
    "cpu with VNNI": (Row(PAIRS, most_channels=32), *_BYTES),
    # Zen 3
    "cpu": (
        Row(DOT, groups=(1, 1), bits=8, products=True),
        Row(DOT, groups=(1, 1), bits=8, patch=(1, 32)),
        Row(DOT, groups=(1, 1), bits=8, is_pointwise=True),
        Row(INT8, groups=(1, 1), bits=8, multiple=32),
        Row(FLOAT32),
    ),
}


def fastest_on(platform: str, only_portable: bool = False) -> tuple[Row, ...]:
    """The table of the fastest lowerings on a platform, e.g. `cpu`; `ALWAYS` on those not measured.

    On a CPU it depends on the instructions of this machine.

    Args:
      platform: of the device.
      only_portable: whether to leave out what other compilers than XLA may get wrong.
    """
    extension = dot_extension()
    kind = f"{platform} with {extension}" if extension else platform
    rows = FASTEST.get(kind, FASTEST.get(platform, ALWAYS))
    return tuple(row for row in rows if row.method.is_portable or not only_portable)
