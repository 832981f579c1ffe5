"""The linear operation of a layer, seen as a product of matrices.

A convolution or a dot product applies a kernel matrix to every patch of its input:
y[p, g, m] = Σ_k x[p, g, k] · W[g, k, m], with p over examples and positions, g over groups, k over
the elements of a patch (window, then input channels) and m over the output channels of a group.
Output channel c of the operation is g·M + m.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from qjax.graph.jaxpr import shape


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`lax.conv_general_dilated` with its static parameters.

    Attributes:
      window_strides: one per spatial axis.
      padding: (low, high) per spatial axis.
      lhs_dilation: spacing of the input elements.
      rhs_dilation: spacing of the window elements.
      dimension_numbers: `lax.ConvDimensionNumbers`.
      groups: feature groups.
      kernel_shape: shape of the kernel operand.
    """

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: Any
    groups: int
    kernel_shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """conv, depthwise_conv (a group per input channel) or grouped_conv."""
        if self.groups == 1:
            return "conv"
        inputs_per_group = self.kernel_shape[self.dimension_numbers.rhs_spec[1]]
        return "depthwise_conv" if inputs_per_group == 1 else "grouped_conv"

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, elements of a patch, output channels of a group)."""
        channels = self.kernel_shape[self.dimension_numbers.rhs_spec[0]]
        patch = math.prod(self.kernel_shape) // channels
        return self.groups, patch, channels // self.groups

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The axes of the output that hold the output channels, the slowest first."""
        return (self.dimension_numbers.out_spec[1],)

    @property
    def channel_sizes(self) -> tuple[int, ...]:
        """The sizes of those axes."""
        return (self.kernel_shape[self.dimension_numbers.rhs_spec[0]],)

    def apply(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        """Convolves; `options` go to `lax.conv_general_dilated`."""
        return lax.conv_general_dilated(
            x,
            kernel,
            self.window_strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            self.dimension_numbers,
            self.groups,
            **options,
        )

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Reorders a kernel to [groups, patch, channels]."""
        out, into, *window = self.dimension_numbers.rhs_spec
        groups, patch, channels = self.matrix_shape
        return (
            kernel.transpose(*window, into, out).reshape(patch, groups, channels).transpose(1, 0, 2)
        )

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Reorders [groups, patch, channels] to the kernel's own shape."""
        out, into, *window = self.dimension_numbers.rhs_spec
        order = (*window, into, out)
        shape = [self.kernel_shape[axis] for axis in order]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.transpose(1, 0, 2).reshape(shape).transpose(inverse)

    def patches(self, x: jax.Array, stride: int = 1) -> jax.Array:
        """Cuts an input into the patches that the kernel meets, or into every `stride`-th of them.

        Args:
          x: the input.
          stride: between the positions that are kept, counted over examples and space.

        Returns:
          float[positions, groups, patch].
        """
        batch, feature, *spatial = self.dimension_numbers.lhs_spec
        x = x.transpose(batch, *spatial, feature)
        edges = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        window = [self.kernel_shape[axis] for axis in self.dimension_numbers.rhs_spec[2:]]
        reach = [(size - 1) * step for size, step in zip(window, self.rhs_dilation, strict=True)]

        def element(offsets: Sequence[int]) -> jax.Array:
            start = [o * step for o, step in zip(offsets, self.rhs_dilation, strict=True)]
            stop = [
                size - extent + first
                for size, extent, first in zip(x.shape[1:-1], reach, start, strict=True)
            ]
            ends = (x.shape[0], *stop, x.shape[-1])
            return lax.slice(x, (0, *start, 0), ends, (1, *self.window_strides, 1))

        shape = (-1, self.groups, x.shape[-1] // self.groups)
        offsets = itertools.product(*map(range, window))
        stacked = jnp.stack([element(o).reshape(shape)[::stride] for o in offsets], axis=2)
        return stacked.reshape(stacked.shape[0], self.groups, -1)


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """`lax.dot_general` of an input and a kernel; batch axes of the kernel are groups.

    Attributes:
      kernel_is_lhs: whether the kernel is the first operand.
      contracting: contracted axes of (input, kernel).
      batch: batch axes of (input, kernel).
      kernel_shape: shape of the kernel operand.
    """

    kernel_is_lhs: bool
    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    kernel_shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The kind: dense, or grouped_dense where the kernel has batch axes."""
        return "grouped_dense" if self.batch[1] else "dense"

    @property
    def _free(self) -> tuple[int, ...]:
        taken = (*self.contracting[1], *self.batch[1])
        return tuple(axis for axis in range(len(self.kernel_shape)) if axis not in taken)

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.kernel_shape[axis] for axis in axes)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, elements of a patch, output channels of a group)."""
        groups, patch, channels = (
            math.prod(self._sizes(axes))
            for axes in (self.batch[1], self.contracting[1], self._free)
        )
        return groups, patch, channels

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The axes of the output that hold the output channels, the slowest first."""
        groups, free = len(self.batch[1]), len(self._free)
        free_axes = range(groups, groups + free) if self.kernel_is_lhs else range(-free, 0)
        return (*range(groups), *free_axes)

    @property
    def channel_sizes(self) -> tuple[int, ...]:
        """The sizes of those axes."""
        return self._sizes((*self.batch[1], *self._free))

    def apply(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        """Multiplies; `options` go to `lax.dot_general`."""
        if self.kernel_is_lhs:
            (x_axes, axes), (x_batch, batch) = self.contracting, self.batch
            dimensions = ((axes, x_axes), (batch, x_batch))
            return lax.dot_general(kernel, x, dimensions, **options)
        return lax.dot_general(x, kernel, (self.contracting, self.batch), **options)

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Reorders a kernel to [groups, patch, channels]."""
        order = (*self.batch[1], *self.contracting[1], *self._free)
        return kernel.transpose(order).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Reorders [groups, patch, channels] to the kernel's own shape."""
        order = (*self.batch[1], *self.contracting[1], *self._free)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape(self._sizes(order)).transpose(inverse)

    def patches(self, x: jax.Array, stride: int = 1) -> jax.Array:
        """Reorders every `stride`-th position of an input to float[positions, groups, patch]."""
        taken = (*self.batch[0], *self.contracting[0])
        rest = [axis for axis in range(x.ndim) if axis not in taken]
        groups, patch, _ = self.matrix_shape
        return x.transpose(*rest, *taken).reshape(-1, groups, patch)[::stride]


Linear = Convolution | DotProduct


def input_axes(operation: Linear) -> tuple[int, ...]:
    """The axes of the input that hold its channels; none for a product with batch axes."""
    if isinstance(operation, Convolution):
        return (operation.dimension_numbers.lhs_spec[1],)
    return () if operation.batch[0] else operation.contracting[0]


def scale_input_channels(operation: Linear, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies a kernel by a factor per channel of its input.

    Args:
      operation: the linear operation.
      kernel: float[groups, patch, channels].
      scale: float[input channels], in the order of `input_axes`.
    """
    groups, patch, _ = operation.matrix_shape
    per_group = len(scale) // groups
    channels = kernel.reshape(groups, patch // per_group, per_group, -1)
    return (channels * scale.reshape(groups, 1, per_group, 1)).reshape(kernel.shape)


def along_axes(axes: Sequence[int], vector: jax.Array, like: jax.Array) -> jax.Array:
    """Shapes a vector over some axes of an array so that it broadcasts against the array."""
    kept = {axis % like.ndim for axis in axes}
    shape = [size if axis in kept else 1 for axis, size in enumerate(like.shape)]
    order = sorted(range(len(axes)), key=lambda i: axes[i] % like.ndim)
    sizes = [like.shape[axis] for axis in axes]
    return vector.reshape(sizes).transpose(order).reshape(shape)


def by_channel(axes: Sequence[int], x: jax.Array) -> jax.Array:
    """Reorders an array to [channels, positions], the channels on `axes`."""
    kept = [axis % x.ndim for axis in axes]
    rest = [axis for axis in range(x.ndim) if axis not in kept]
    return x.transpose(*kept, *rest).reshape(math.prod(x.shape[axis] for axis in kept), -1)


def output_matrix(operation: Linear, y: jax.Array) -> jax.Array:
    """Reorders an output to [positions, groups, channels], positions as in `patches`."""
    groups, _, channels = operation.matrix_shape
    return y.transpose(_output_order(operation, y.ndim)).reshape(-1, groups, channels)


def from_output_matrix(
    operation: Linear, matrix: jax.Array, output_shape: tuple[int, ...]
) -> jax.Array:
    """Undoes `output_matrix`: [positions, groups, channels] to an output of that shape."""
    order = _output_order(operation, len(output_shape))
    y = matrix.reshape([output_shape[axis] for axis in order])
    return y.transpose(sorted(range(len(order)), key=order.__getitem__))


def _output_order(operation: Linear, rank: int) -> list[int]:
    """The axes of an output: positions as in `patches`, then channels."""
    channel_axes = [axis % rank for axis in operation.channel_axes]
    is_convolution = isinstance(operation, Convolution)
    order = operation.dimension_numbers.out_spec if is_convolution else range(rank)
    return [*(axis for axis in order if axis not in channel_axes), *channel_axes]


def linear_operation(equation: core.JaxprEqn, kernel_is_lhs: bool) -> Linear:
    """Reads the operation of a contraction equation.

    Args:
      equation: a `conv_general_dilated` or a `dot_general`.
      kernel_is_lhs: which operand is the kernel.

    Raises:
      ValueError: a convolution whose kernel is its first operand, or with batch groups.
    """
    params = equation.params
    kernel_shape = shape(equation.invars[0 if kernel_is_lhs else 1])
    if equation.primitive.name == "dot_general":
        kernel, x = (0, 1) if kernel_is_lhs else (1, 0)
        contracting, batch = (
            (tuple(axes[x]), tuple(axes[kernel])) for axes in params["dimension_numbers"]
        )
        return DotProduct(kernel_is_lhs, contracting, batch, kernel_shape)
    if kernel_is_lhs or params["batch_group_count"] != 1:
        raise ValueError("a convolution with the kernel as first operand or with batch groups")
    return Convolution(
        tuple(params["window_strides"]),
        tuple((low, high) for low, high in params["padding"]),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        params["dimension_numbers"],
        params["feature_group_count"],
        kernel_shape,
    )


def along_channels(operation: Linear, vector: jax.Array, ndim: int) -> jax.Array:
    """Shapes a vector of the output channels so that it broadcasts against the output.

    Args:
      operation: the linear operation.
      vector: float[groups * channels].
      ndim: the rank of the output.

    Returns:
      float[...] of rank `ndim`, with 1 on every axis but the channels'.
    """
    shape = [1] * ndim
    for axis, size in zip(operation.channel_axes, operation.channel_sizes, strict=True):
        shape[axis] = size
    return vector.reshape(shape)
