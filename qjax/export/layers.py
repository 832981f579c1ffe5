"""Layers as ONNX nodes between DequantizeLinear and QuantizeLinear, where runtimes fuse them.

A layer with an integer accumulator becomes

    input → QuantizeLinear → DequantizeLinear ┐
    kernel codes → DequantizeLinear(s_w) ─────┼→ Conv or Gemm → QuantizeLinear → DequantizeLinear
    bias int32 → DequantizeLinear(s_w·s_x) ───┘

which a runtime computes as acc = q_b + Σ q_w·(q_x − z_x), clip(round(acc·M) + z_y). Dense layers
are products of matrices, Gemm, and those with a kernel per group are convolutions of width 1 with
groups: both are fused, bias included.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from qjax.export.blocks import blocks_of, is_block_product
from qjax.export.primitives import write_equation
from qjax.export.sizes import Batch, Size, Sizes
from qjax.export.writer import EVERYTHING, Tensor, Value, Writer, clipped, with_zero
from qjax.formats.affine import QParams
from qjax.graph.activation import Activation
from qjax.graph.jaxpr import dtype, shape
from qjax.graph.junctions import Junction
from qjax.graph.layers import Site
from qjax.graph.matmuls import Matmul
from qjax.graph.operation import Convolution, DotProduct
from qjax.run.layer import QuantizedLayer, accumulator_scale
from qjax.run.matmul import QuantizedMatmul
from qjax.run.table import QuantizedTable

INT4_BITS = 4  # codes of at most that width are stored two to a byte


def write_layer(writer: Writer, site: Site, layer: QuantizedLayer, value: Value) -> Tensor:
    """Writes a layer up to its quantized pre-activation output."""
    writer.graph.scope = site.layer.name
    value = writer.tensor(value, site.input)
    if dtype(site.input) != jnp.float32:
        value = Tensor(writer.cast(value.name, jnp.float32), value.order, value.repeated)
    if layer.folds_input_scales:
        value = _divided(writer, site, layer, value)
    is_dense = isinstance(site.layer.operation, DotProduct)
    y = (_dense if is_dense else _convolution)(writer, site, layer, value)
    for moves in site.movement.equations:
        [equation] = moves.equations
        [y] = write_equation(writer, equation, [y])
    if dtype(site.output) != jnp.float32:
        y = Tensor(writer.cast(y.name, dtype(site.output)), y.order)
    writer.after = site.layer.name
    return y


def write_activated(writer: Writer, site: Site, layer: QuantizedLayer, value: Tensor) -> Tensor:
    """Rounds a layer's output after its activation, where the layer says so."""
    return value if layer.activated is None else writer.rounded(value, layer.activated)


def write_junction(writer: Writer, junction: Junction, grid: QParams, value: Tensor) -> Tensor:
    """Rounds a sum, a concatenation, a pool, or what goes into one of them."""
    return _rounded(writer, junction.activation, grid, value)


def write_matmul(
    writer: Writer, step: Matmul, matmul: QuantizedMatmul, lhs: Value, rhs: Value
) -> Tensor:
    """Writes a product of two activations as a MatMul of the codes of both."""
    writer.graph.scope = step.name
    product, (left, right) = step.product, step.operands
    (batch, other), (depth, depth_of_other) = product.batch, product.contracting
    rows, columns = product.free((len(shape(left)), len(shape(right))))
    x = _matrices(writer, left, matmul.lhs, lhs, (batch, rows, depth))
    y = _matrices(writer, right, matmul.rhs, rhs, (other, depth_of_other, columns))
    rank = len(batch) + 2
    z = Tensor(writer.graph.node("MatMul", x, y), tuple(range(rank)))
    z = z if matmul.outputs is None else writer.rounded(z, matmul.outputs)
    if len(rows) != 1 or len(columns) != 1:
        sizes = writer.sizes(step.output)
        z = Tensor(writer.reshaped(z.name, sizes), tuple(range(len(sizes))), bounds=z.bounds)
    if dtype(step.output) != jnp.float32:
        z = Tensor(writer.cast(z.name, dtype(step.output)), z.order)
    writer.after = step.name
    return z


def _matrices(
    writer: Writer, atom: Var, grid: QParams, value: Value, runs: Sequence[Sequence[int]]
) -> str:
    """An operand as matrices on its grid: batch axes, and one for each of two runs of axes."""
    value, sizes = writer.tensor(value, atom), writer.sizes(atom)
    x = writer.placed(value, atom, [axis for run in runs for axis in run])
    if dtype(atom) != jnp.float32:
        x = Tensor(writer.cast(x.name, jnp.float32), x.order)
    batch, *others = ([sizes[axis] for axis in run] for run in runs)
    if any(len(run) != 1 for run in others):
        shape = (*batch, *(_product(tuple(run)) for run in others))
        x = Tensor(writer.reshaped(x.name, shape), tuple(range(len(shape))), bounds=x.bounds)
    return writer.rounded(x, grid).name


def _convolution(writer: Writer, site: Site, layer: QuantizedLayer, value: Tensor) -> Tensor:
    operation = site.layer.operation
    assert isinstance(operation, Convolution)
    numbers = operation.dimension_numbers
    x = writer.placed(value, site.input, numbers.lhs_spec)
    sizes = writer.sizes(site.input)
    zero = writer.graph.constant(np.float32(0))
    gaps = [0, 0, *(dilation - 1 for dilation in operation.lhs_dilation)]
    cuts = [(0, 0), (0, 0), *((min(a, 0), min(b, 0)) for a, b in operation.padding)]
    name = writer.dilated(x.name, tuple(sizes[axis] for axis in numbers.lhs_spec), gaps, zero)
    name = writer.padded(name, cuts, zero)
    x = x if name == x.name else Tensor(name, x.order, bounds=with_zero(x.bounds))
    window = [operation.kernel_shape[axis] for axis in numbers.rhs_spec[2:]]
    out, into = (operation.kernel_shape[axis] for axis in numbers.rhs_spec[:2])
    last = len(window)
    channels_first = Arrangement((1, 0, 2), (*window, into, out), (last + 1, last, *range(last)))
    y = writer.graph.node(
        "Conv",
        *_operands(writer, site, layer, x, channels_first, 0),
        kernel_shape=window,
        strides=list(operation.window_strides),
        dilations=list(operation.rhs_dilation),
        pads=[max(edge[side], 0) for side in (0, 1) for edge in operation.padding],
        group=operation.groups,
    )
    return _output(writer, site, layer, Tensor(y, tuple(numbers.out_spec)))


def _dense(writer: Writer, site: Site, layer: QuantizedLayer, value: Tensor) -> Tensor:
    operation = site.layer.operation
    assert isinstance(operation, DotProduct)
    (contracted, _), (batch, _) = operation.contracting, operation.batch
    sizes = writer.sizes(site.input)
    rest = [axis for axis in range(len(sizes)) if axis not in (*contracted, *batch)]
    x = writer.placed(value, site.input, (*rest, *batch, *contracted))
    groups, patch, channels = operation.matrix_shape
    positions = tuple(sizes[axis] for axis in rest)
    matrix = (_product(positions), groups * patch, *((1,) if batch else ()))
    if (*positions, *(sizes[axis] for axis in contracted)) != matrix:
        name = writer.reshaped(x.name, matrix)
        x = Tensor(name, tuple(range(len(matrix))), bounds=x.bounds)
    if batch:
        by_group = Arrangement((0, 2, 1), (groups * channels, patch, 1), (0, 1, 2))
        inputs = _operands(writer, site, layer, x, by_group, 0)
        y = writer.graph.node("Conv", *inputs, kernel_shape=[1], group=groups)
    elif is_block_product(operation, layer, writer.target):
        y = _block_product(writer, layer, x)
    else:
        as_it_is = Arrangement((0, 1, 2), (patch, channels), (0, 1))
        y = writer.graph.node("Gemm", *_operands(writer, site, layer, x, as_it_is, 1))
    y = _output(writer, site, layer, Tensor(y, tuple(range(len(matrix)))))
    # The axes of the tensor: positions, groups, channels. JAX has groups first, then those of the
    # first operand.
    axes = len(rest), len(batch), len(operation.channel_sizes) - len(batch)
    order = _runs(axes, (1, 2, 0) if operation.kernel_is_lhs else (1, 0, 2))
    shape = (*positions, *operation.channel_sizes)
    if shape == (matrix[0], channels):
        return dataclasses.replace(y, order=order)
    return Tensor(writer.reshaped(y.name, shape), order, bounds=y.bounds)


def _runs(lengths: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    """For runs of axes, the axes that they are once the runs stand in the order of `places`."""
    starts = {run: sum(lengths[r] for r in places[:i]) for i, run in enumerate(places)}
    return tuple(starts[run] + i for run, length in enumerate(lengths) for i in range(length))


def _product(sizes: Sizes) -> Size:
    static = math.prod(size for size in sizes if not isinstance(size, Batch))
    growing = [size.times for size in sizes if isinstance(size, Batch)]
    assert len(growing) <= 1
    return Batch(growing[0] * static) if growing else static


# ---- Operands


class Arrangement(NamedTuple):
    """What brings a kernel matrix [groups, patch, channels] to the shape that an operator takes.

    Attributes:
      before: the order of its axes.
      shape: that they are then reshaped to.
      after: the order of these.
    """

    before: tuple[int, ...]
    shape: tuple[int, ...]
    after: tuple[int, ...]

    def of_array(self, matrix: np.ndarray) -> np.ndarray:
        """Arranges an array."""
        return matrix.transpose(self.before).reshape(self.shape).transpose(self.after)

    def of_tensor(self, writer: Writer, name: str) -> str:
        """Arranges a tensor."""
        graph = writer.graph
        name = graph.node("Transpose", name, perm=list(self.before))
        name = graph.node("Reshape", name, writer.integers(self.shape))
        return graph.node("Transpose", name, perm=list(self.after))

    @property
    def is_none(self) -> bool:
        """Whether a matrix of one group is taken as it is."""
        return len(self.shape) == 2


def _operands(
    writer: Writer,
    site: Site,
    layer: QuantizedLayer,
    x: Tensor,
    arrangement: Arrangement,
    channel_axis: int,
) -> list[str]:
    """Input, kernel and, if there is one, bias of a layer, in real units, read from codes."""
    operation = site.layer.operation
    operands = [
        _input(writer, layer, x).name,
        _kernel(writer, layer, arrangement, channel_axis),
    ]
    bias = np.asarray(layer.bias)
    if not bias.any():
        return operands
    name = writer.graph.constant(bias, "bias")
    if layer.has_integer_accumulator:
        scale = writer.graph.constant(accumulator_scale(operation, layer), "bias_scale")
        name = writer.graph.node("DequantizeLinear", name, scale, axis=0)
    return [*operands, name]


def _divided(writer: Writer, site: Site, layer: QuantizedLayer, value: Tensor) -> Tensor:
    """An input in units of its scales per channel, which are part of the kernel."""
    assert layer.grid is not None
    x = writer.placed(value, site.input, value.order)
    inverse = np.asarray(layer.grid.inverse_scale).transpose(x.order)
    factor = writer.graph.constant(inverse, "inverse_scale")
    return Tensor(writer.graph.node("Mul", x.name, factor), x.order)


def _input(writer: Writer, layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Rounds a layer's input; one that was divided by its scales is codes with the scale 1."""
    grid = layer.grid
    if grid is None:
        return x
    if layer.folds_input_scales:
        grid = QParams(jnp.float32(1), jnp.int32(0), grid.qmin, grid.qmax, grid.dtype)
    return writer.rounded(x, grid)


def _kernel(
    writer: Writer, layer: QuantizedLayer, arrangement: Arrangement, channel_axis: int
) -> str:
    graph, format, kernel = writer.graph, layer.weights, np.asarray(layer.kernel)
    if format is None:
        return graph.constant(arrangement.of_array(kernel), "kernel")
    assert isinstance(format, QParams)
    type = stored_type(format)
    groups, patch, channels = kernel.shape
    scale, zero_point = np.asarray(format.scale), np.asarray(format.zero_point)
    if layer.is_per_group:
        return _blocked_kernel(writer, layer, arrangement)
    if scale.size > 1:
        shape = groups, 1, channels
        scale, zero_point = (
            np.broadcast_to(leaf, shape).reshape(-1) for leaf in (scale, zero_point)
        )
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    names = (
        graph.own_constant(arrangement.of_array(kernel).astype(type), "kernel"),
        graph.constant(scale, "kernel_scale"),
        graph.own_constant(zero_point.astype(type), "kernel_zero_point"),
    )
    return graph.node("DequantizeLinear", *names, axis=channel_axis)


def _blocked_kernel(writer: Writer, layer: QuantizedLayer, arrangement: Arrangement) -> str:
    """The kernel of a layer whose groups of inputs have scales of their own."""
    graph, format, kernel = writer.graph, layer.weights, np.asarray(layer.kernel)
    groups, patch, channels = kernel.shape
    blocks = format.scale.shape[1]
    leaves = [
        np.broadcast_to(x, (groups, blocks, channels)) for x in (format.scale, format.zero_point)
    ]
    arrays, axis = [kernel, *leaves], 1
    if arrangement.is_none:
        arrays, axis = [array[0] for array in arrays], 0
    type = stored_type(format)
    codes, scale, zero_point = arrays
    names = (
        graph.own_constant(codes.astype(type), "kernel"),
        graph.constant(scale, "kernel_scale"),
        graph.own_constant(zero_point.astype(type), "kernel_zero_point"),
    )
    real = graph.node("DequantizeLinear", *names, axis=axis, block_size=-(-patch // blocks))
    return real if arrangement.is_none else arrangement.of_tensor(writer, real)


def write_table(writer: Writer, table: QuantizedTable, var: Var) -> Value:
    """A table in real units: read from codes where these are integers, else its values."""
    if type(table.weights) is not QParams:
        return table.values(shape(var), dtype(var))
    graph, format, codes = writer.graph, table.weights, np.asarray(table.codes)
    rows, elements, channels = codes.shape
    blocks, stored = format.scale.shape[1], stored_type(format)
    scale, zero_point = (
        np.broadcast_to(leaf, (rows, blocks, channels))
        for leaf in (format.scale, format.zero_point)
    )
    names = (
        graph.own_constant(codes.astype(stored), "table"),
        graph.constant(scale, "table_scale"),
        graph.own_constant(zero_point.astype(stored), "table_zero_point"),
    )
    size = -(-elements // blocks)
    real = graph.node("DequantizeLinear", *names, axis=1, block_size=size)
    name = graph.node("Reshape", real, writer.integers(shape(var)))
    return Tensor(writer.cast(name, dtype(var)), tuple(range(len(shape(var)))))


def _block_product(writer: Writer, layer: QuantizedLayer, x: Tensor) -> str:
    """A product with codes of 4 bits, in one operation of ONNX Runtime's own."""
    graph, blocks, bias = writer.graph, blocks_of(layer), np.asarray(layer.bias)
    return graph.node(
        "MatMulNBits",
        x.name,
        graph.own_constant(blocks.codes, "kernel"),
        graph.constant(blocks.scale, "kernel_scale"),
        *(["", "", graph.constant(bias, "bias")] if bias.any() else []),
        K=layer.kernel.shape[1],
        domain="com.microsoft",
        **blocks.attributes,
    )


def stored_type(format: QParams) -> np.dtype:
    """The type that codes of a kernel have in a file."""
    if format.bits > INT4_BITS:
        return np.dtype(format.dtype)
    return np.dtype(jnp.int4 if format.is_signed else jnp.uint4)


# ---- Outputs


def _output(writer: Writer, site: Site, layer: QuantizedLayer, y: Tensor) -> Tensor:
    """Rounds a layer's output; its channels lie on axis 1."""
    if layer.outputs is None:
        return y
    return _rounded(writer, site.activation, layer.outputs, y, axis=1)


def _rounded(
    writer: Writer, activation: Activation, grid: QParams, y: Tensor, axis: int | None = None
) -> Tensor:
    """Rounds what an activation follows."""
    low, _ = activation.bounds
    if writer.target.clips_first and low == 0.0:
        y = clipped(writer, y, (low, EVERYTHING[1]))  # zero is on the grid: it commutes
    return writer.rounded(y, grid, axis)
