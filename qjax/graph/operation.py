"""The linear operation of a layer, seen as a product of matrices.

A convolution or a dot product applies a kernel matrix to every patch of its input:
y[p, g, m] = Σ_k x[p, g, k] · W[g, k, m], with p over examples and positions, g over groups, k over
the elements of a patch (window, then input channels) and m over the output channels of a group.
Output channel c of the operation is g·M + m.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from qjax.graph.jaxpr import shape


class Linear(Protocol):
    """A linear operation with its static parameters; hashable."""

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel operand."""
        ...

    @property
    def kind(self) -> str:
        """conv, depthwise_conv, grouped_conv, dense or grouped_dense."""
        ...

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, elements of a patch, output channels of a group)."""
        ...

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The axes of the output that hold the output channels, the slowest first."""
        ...

    @property
    def channel_sizes(self) -> tuple[int, ...]:
        """The sizes of those axes."""
        ...

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the input that hold its channels."""
        ...

    @property
    def reduced_axes(self) -> tuple[int, int] | None:
        """The one axis of the input channels in (input, kernel), None where there is not one."""
        ...

    def position_axis(self, rank: int) -> int | None:
        """The first axis of an input along which it meets the same kernel, None if there is none.

        Args:
          rank: of the input.
        """
        ...

    @property
    def is_product(self) -> bool:
        """Whether the operation is a product of matrices as it stands."""
        ...

    def apply(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        """Computes the operation; `options` go to the primitive."""
        ...

    def evaluate(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Computes the operation in full precision, by what is fastest on the device."""
        ...

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Reorders a kernel to [groups, patch, channels]."""
        ...

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Reorders [groups, patch, channels] to the kernel's own shape."""
        ...

    def patches(self, x: jax.Array, stride: int = 1) -> jax.Array:
        """Cuts an input into the patches that the kernel meets, or every `stride`-th of them.

        Args:
          x: the input.
          stride: between the positions that are kept, counted over examples and space.

        Returns:
          float[positions, groups, patch].
        """
        ...

    def unfold(self, x: jax.Array) -> jax.Array:
        """Cuts an input into patches as `patches` does, the axes of the positions kept apart.

        Args:
          x: the input.

        Returns:
          [*positions, groups, patch], of the type of `x`.
        """
        ...

    def output_order(self, rank: int) -> list[int]:
        """The axes of an output: positions as in `patches`, then channels."""
        ...

    @property
    def ends_with_channels(self) -> bool:
        """Whether the axes of an output are the positions as in `unfold`, then the channels."""
        ...

    @property
    def channels_last(self) -> "Linear":
        """The same convolution of examples, then space, then channels; a product as it is."""
        ...

    def input_order(self, rank: int) -> list[int]:
        """The axes of an input in the order of those of `channels_last`."""
        ...

    def padded(self, x: jax.Array, zero: jax.Array) -> tuple["Linear", jax.Array]:
        """Pads and dilates an input with `zero`: (what is left to do, the new input)."""
        ...

    @property
    def per_group(self) -> "Linear":
        """The same operation with one output channel to a group."""
        ...

    def by_group(self, x: jax.Array) -> tuple["Linear", jax.Array]:
        """Takes the groups apart.

        Args:
          x: the input.

        Returns:
          The operation of any one group, and the inputs of all, [groups, ...].
        """
        ...


_TAPS = 49  # of a kernel per channel that is summed over: 7 by 7
_WIDE = 64  # bytes of a row that XLA concatenates fast


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

    def evaluate(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Convolves in full precision.

        On a CPU a channel that meets a kernel of its own is a sum of shifted products: XLA's
        convolution takes four times as long for it.
        """
        _, taps, multiplier = self.matrix_shape
        is_summed = self.kind == "depthwise_conv" and multiplier == 1 and taps <= _TAPS
        if is_summed and jax.default_backend() == "cpu":
            return self._sum_shifted(x, kernel)
        return self.apply(x, kernel, precision=lax.Precision.HIGHEST)

    def _sum_shifted(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Σ_k x[· + k]·w[k], for a kernel per channel."""
        numbers = self.dimension_numbers
        axes = numbers.lhs_spec
        left, x = self.padded(x, jnp.zeros((), x.dtype))
        matrix = self.to_matrix(kernel)[:, :, 0]
        total = None
        for tap, shifted in enumerate(left._shifted(x, axes[2:])):
            product = shifted * lax.broadcast_in_dim(matrix[:, tap], shifted.shape, (axes[1],))
            total = product if total is None else total + product
        assert total is not None
        return total.transpose([axes[numbers.out_spec.index(axis)] for axis in range(x.ndim)])

    def _shifted(self, x: jax.Array, axes: Sequence[int]) -> Iterator[jax.Array]:
        """What each element of the window meets of an input that needs no padding.

        Args:
          x: the input, in any layout.
          axes: its spatial axes.
        """
        window = [self.kernel_shape[axis] for axis in self.dimension_numbers.rhs_spec[2:]]
        ends = [
            (x.shape[axis] - (extent - 1) * step - 1) // stride * stride + 1
            for axis, extent, step, stride in zip(
                axes, window, self.rhs_dilation, self.window_strides, strict=True
            )
        ]
        for offsets in np.ndindex(*window):
            starts, limits, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
            for i, axis in enumerate(axes):
                starts[axis] = offsets[i] * self.rhs_dilation[i]
                limits[axis] = starts[axis] + ends[i]
                strides[axis] = self.window_strides[i]
            yield lax.slice(x, starts, limits, strides)

    def unfold(self, x: jax.Array) -> jax.Array:
        """Joins the shifted slices of an input along its channels: [*positions, groups, patch]."""
        left, x = self.padded(x, jnp.zeros((), x.dtype))
        x = x.transpose(self.input_order(x.ndim))
        joined = _joined(list(left._shifted(x, range(1, x.ndim - 1))))
        groups, patch, _ = self.matrix_shape
        positions = joined.shape[:-1]
        if groups == 1:
            return joined.reshape(*positions, 1, patch)
        split = joined.reshape(*positions, -1, groups, x.shape[-1] // groups)
        return jnp.moveaxis(split, -2, -3).reshape(*positions, groups, patch)

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Reorders a kernel to [groups, patch, channels]."""
        out, into, *window = self.dimension_numbers.rhs_spec
        groups, patch, channels = self.matrix_shape
        return (
            kernel.transpose(*window, into, out).reshape(patch, groups, channels).transpose(1, 0, 2)
        )

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the input that hold its channels."""
        return (self.dimension_numbers.lhs_spec[1],)

    @property
    def reduced_axes(self) -> tuple[int, int] | None:
        """The axis of the input channels in (input, kernel), None where there are groups."""
        numbers = self.dimension_numbers
        return None if self.groups > 1 else (numbers.lhs_spec[1], numbers.rhs_spec[1])

    def position_axis(self, rank: int) -> int | None:
        """The axis of the examples."""
        return self.dimension_numbers.lhs_spec[0]

    @property
    def is_product(self) -> bool:
        """False: patches have to be cut first."""
        return False

    @property
    def per_group(self) -> "Convolution":
        """The same operation with one output channel to a group."""
        shape = list(self.kernel_shape)
        shape[self.dimension_numbers.rhs_spec[0]] = self.groups
        return dataclasses.replace(self, kernel_shape=tuple(shape))

    def by_group(self, x: jax.Array) -> tuple["Convolution", jax.Array]:
        """Takes the groups apart: (the operation of one, the inputs of all, [groups, ...])."""
        shape, out = list(self.kernel_shape), self.dimension_numbers.rhs_spec[0]
        shape[out] //= self.groups
        axis = self.dimension_numbers.lhs_spec[1]
        inputs = x.reshape(*x.shape[:axis], self.groups, -1, *x.shape[axis + 1 :])
        one = dataclasses.replace(self, groups=1, kernel_shape=tuple(shape))
        return one, jnp.moveaxis(inputs, axis, 0)

    def output_order(self, rank: int) -> list[int]:
        """The axes of an output: positions as in `patches`, then channels."""
        batch, feature, *spatial = self.dimension_numbers.out_spec
        return [batch, *spatial, feature]

    @property
    def ends_with_channels(self) -> bool:
        """Whether the layout is NHWC, or that of another number of spatial axes."""
        rank = len(self.kernel_shape)
        return self.output_order(rank) == list(range(rank))

    @property
    def channels_last(self) -> "Convolution":
        """The same operation, its layout NHWC and HWIO, or that of another number of axes."""
        rank = len(self.kernel_shape)
        last, spatial = rank - 1, range(1, rank - 1)
        layout, kernel = (0, last, *spatial), (last, last - 1, *range(rank - 2))
        out, into, *window = self.dimension_numbers.rhs_spec
        return dataclasses.replace(
            self,
            dimension_numbers=lax.ConvDimensionNumbers(layout, kernel, layout),
            kernel_shape=tuple(self.kernel_shape[axis] for axis in (*window, into, out)),
        )

    def input_order(self, rank: int) -> list[int]:
        """The axes of the examples, of space and of the channels."""
        batch, feature, *spatial = self.dimension_numbers.lhs_spec
        return [batch, *spatial, feature]

    def padded(self, x: jax.Array, zero: jax.Array) -> tuple["Convolution", jax.Array]:
        """Pads and dilates an input with `zero`: (what is left to do, the new input)."""
        edges = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        rank = len(edges)
        unpadded = dataclasses.replace(self, padding=((0, 0),) * rank, lhs_dilation=(1,) * rank)
        config = [(0, 0, 0)] * x.ndim
        for axis, edge in zip(self.dimension_numbers.lhs_spec[2:], edges, strict=True):
            config[axis] = edge
        return unpadded, lax.pad(x, zero.astype(x.dtype), config) if any(map(any, config)) else x

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
        x = x.transpose(self.input_order(x.ndim))
        edges = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        window = [self.kernel_shape[axis] for axis in self.dimension_numbers.rhs_spec[2:]]
        sizes, channels = x.shape[1:-1], x.shape[-1]
        starts = [
            np.arange(0, size - (extent - 1) * step, stride_)
            for size, extent, step, stride_ in zip(
                sizes, window, self.rhs_dilation, self.window_strides, strict=True
            )
        ]
        offsets = [np.arange(n) * step for n, step in zip(window, self.rhs_dilation, strict=True)]
        # Rows of x as [examples * space, channels]: one per position, and the reach of the window.
        examples = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] * math.prod(sizes)
        rows = (examples + _flat_places(starts, sizes)).reshape(-1)[::stride]
        places = rows[:, None] + _flat_places(offsets, sizes)
        patches = x.reshape(-1, channels).at[places].get(mode="promise_in_bounds")
        split = patches.reshape(rows.shape[0], -1, self.groups, channels // self.groups)
        return split.transpose(0, 2, 1, 3).reshape(rows.shape[0], self.groups, -1)


def _joined(slices: Sequence[jax.Array]) -> jax.Array:
    """Joins arrays of one shape along their last axis.

    XLA copies the slices before it concatenates them; where they are narrow it takes half the time
    to write them one after the other into one array.
    """
    channels = slices[0].shape[-1]
    if len(slices) == 1 or channels * slices[0].dtype.itemsize >= _WIDE:
        return jnp.concatenate(slices, axis=-1)
    joined = jnp.zeros((*slices[0].shape[:-1], channels * len(slices)), slices[0].dtype)
    for i, part in enumerate(slices):
        joined = lax.dynamic_update_slice_in_dim(joined, part, i * channels, axis=-1)
    return joined


def _flat_places(places: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """The places that are the product of those on each axis, counted over all axes, [1, n]."""
    grids = np.meshgrid(*places, indexing="ij")
    flat = np.ravel_multi_index([grid.ravel() for grid in grids], sizes)
    return flat.astype(np.int32)[None]


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

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the input that hold its channels; none where the kernel has batch axes."""
        return () if self.batch[0] else self.contracting[0]

    @property
    def reduced_axes(self) -> tuple[int, int] | None:
        """The contracted axis of (input, kernel), None where there is not just one."""
        x_axes, kernel_axes = self.contracting
        return (x_axes[0], kernel_axes[0]) if len(x_axes) == 1 and not self.batch[0] else None

    def position_axis(self, rank: int) -> int | None:
        """The first axis that is neither contracted nor one of groups."""
        taken = (*self.batch[0], *self.contracting[0])
        return next((axis for axis in range(rank) if axis not in taken), None)

    @property
    def is_product(self) -> bool:
        """True: it is a product of matrices as it stands."""
        return True

    def output_order(self, rank: int) -> list[int]:
        """The axes of an output: positions as in `patches`, then channels."""
        channels = [axis % rank for axis in self.channel_axes]
        return [*(axis for axis in range(rank) if axis not in channels), *channels]

    @property
    def ends_with_channels(self) -> bool:
        """Whether the kernel is the second operand, without batch axes."""
        return not self.kernel_is_lhs and not self.batch[1]

    @property
    def per_group(self) -> "DotProduct":
        """The same operation with one output channel to a group."""
        shape = [1 if axis in self._free else n for axis, n in enumerate(self.kernel_shape)]
        return dataclasses.replace(self, kernel_shape=tuple(shape))

    def by_group(self, x: jax.Array) -> tuple["DotProduct", jax.Array]:
        """Takes the groups apart: (the operation of one, the inputs of all, [groups, ...])."""
        contracting = tuple(
            tuple(axis - sum(each < axis for each in batch) for axis in axes)
            for axes, batch in zip(self.contracting, self.batch, strict=True)
        )
        kept = [n for axis, n in enumerate(self.kernel_shape) if axis not in self.batch[1]]
        one = DotProduct(self.kernel_is_lhs, (contracting[0], contracting[1]), ((), ()), (*kept,))
        inputs = jnp.moveaxis(x, self.batch[0], range(len(self.batch[0])))
        return one, inputs.reshape(-1, *inputs.shape[len(self.batch[0]) :])

    @property
    def channels_last(self) -> "DotProduct":
        """Itself."""
        return self

    def input_order(self, rank: int) -> list[int]:
        """The axes as they are."""
        return [*range(rank)]

    def padded(self, x: jax.Array, zero: jax.Array) -> tuple["DotProduct", jax.Array]:
        """Nothing is padded."""
        return self, x

    def apply(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        """Multiplies; `options` go to `lax.dot_general`."""
        if self.kernel_is_lhs:
            (x_axes, axes), (x_batch, batch) = self.contracting, self.batch
            dimensions = ((axes, x_axes), (batch, x_batch))
            return lax.dot_general(kernel, x, dimensions, **options)
        return lax.dot_general(x, kernel, (self.contracting, self.batch), **options)

    def evaluate(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Multiplies in full precision."""
        return self.apply(x, kernel, precision=lax.Precision.HIGHEST)

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
        unfolded = self.unfold(x)
        return unfolded.reshape(-1, *unfolded.shape[-2:])[::stride]

    def unfold(self, x: jax.Array) -> jax.Array:
        """Reorders an input to [*positions, groups, patch]."""
        taken = (*self.batch[0], *self.contracting[0])
        rest = [axis for axis in range(x.ndim) if axis not in taken]
        groups, patch, _ = self.matrix_shape
        positions = [x.shape[axis] for axis in rest]
        return x.transpose(*rest, *taken).reshape(*positions, groups, patch)


def scale_input_channels(operation: Linear, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies a kernel by a factor per channel of its input.

    Args:
      operation: the linear operation.
      kernel: float[groups, patch, channels].
      scale: float[input channels], in the order of its `input_axes`.
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
    return y.transpose(operation.output_order(y.ndim)).reshape(-1, groups, channels)


def from_positions(operation: Linear, y: jax.Array) -> jax.Array:
    """Brings [*positions, groups, channels], positions as in `unfold`, to the output's layout."""
    y = y.reshape(*y.shape[:-2], *operation.channel_sizes)
    order = operation.output_order(y.ndim)
    return y.transpose(sorted(range(len(order)), key=order.__getitem__))


def shape_of_output(operation: Linear, x_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an operation's output, of that of its input."""
    given = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x_shape, operation.kernel_shape))
    return jax.eval_shape(operation.apply, *given).shape


def from_channels_last(operation: Linear, y: jax.Array) -> jax.Array:
    """Brings an output of `operation.channels_last` to the layout of the operation's own."""
    if operation.is_product:
        return y
    order = operation.output_order(y.ndim)
    return y.transpose(sorted(range(y.ndim), key=order.__getitem__))


def from_output_matrix(
    operation: Linear, matrix: jax.Array, output_shape: tuple[int, ...]
) -> jax.Array:
    """Undoes `output_matrix`: [positions, groups, channels] to an output of that shape."""
    order = operation.output_order(len(output_shape))
    y = matrix.reshape([output_shape[axis] for axis in order])
    return y.transpose(sorted(range(len(order)), key=order.__getitem__))


def linear_operation(equation: core.JaxprEqn, kernel_is_lhs: bool) -> Linear | None:
    """Reads the operation of a contraction equation.

    Args:
      equation: a `conv_general_dilated` or a `dot_general`.
      kernel_is_lhs: which operand is the kernel.

    Returns:
      The operation; None of a convolution whose kernel is its first operand, or with batch groups.
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
        return None
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
