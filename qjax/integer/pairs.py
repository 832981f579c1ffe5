"""Convolutions of few channels, two columns of the output at a time.

A patch of few channels is cut from its input in rows of a few bytes, which takes longer than to
multiply it. Two neighbouring columns of the output read one column more than one of them does: as
one position with twice the channels, they take half as many patches, with rows twice as long, and
a kernel matrix that holds the kernel twice, shifted by a column, and zeros.
"""

import dataclasses
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from qjax.graph.operation import Convolution, Linear, from_channels_last, shape_of_output
from qjax.integer.products import multiply


def has_pairs(operation: Linear) -> TypeGuard[Convolution]:
    """Whether an operation is a convolution without groups whose columns overlap."""
    if not isinstance(operation, Convolution) or operation.groups > 1:
        return False
    window = _window(operation)
    if not window:
        return False
    return window[-1] > 1 == operation.window_strides[-1] == operation.rhs_dilation[-1]


def kernel_of_pairs(operation: Convolution, kernel: jax.Array) -> jax.Array:
    """The kernel matrix of two columns.

    Args:
      operation: a convolution that has pairs.
      kernel: [1, patch, channels].

    Returns:
      [1, patch of both, 2 * channels].
    """
    *outer, extent = _window(operation)
    channels = kernel.shape[-1]
    columns = kernel.reshape(*outer, extent, -1, channels)
    free = 2 * _pairs_of(extent) - extent
    shifted = [
        jnp.pad(columns, [(0, 0)] * len(outer) + [(by, free - by), (0, 0), (0, 0)]) for by in (0, 1)
    ]
    return jnp.stack(shifted, axis=-2).reshape(1, -1, 2 * channels)


def multiply_pairs(
    operation: Convolution, x: jax.Array, zero: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Convolves by products of matrices, two columns of the output at a time.

    Args:
      operation: a convolution that has pairs.
      x: its input.
      zero: what pads it.
      kernel: from `kernel_of_pairs`.

    Returns:
      The output of the operation.
    """
    *outer, extent = _window(operation)
    columns = shape_of_output(operation, x.shape)[operation.output_order(x.ndim)[-2]]
    width = columns + extent - 1
    pairs, reach = (columns + 1) // 2, _pairs_of(extent)
    # The columns that are added meet zeros, or give the last column of an odd number of them.
    low, high = operation.padding[-1]
    padding = (*operation.padding[:-1], (low, high + 2 * (pairs + reach - 1) - width))
    left, x = dataclasses.replace(operation, padding=padding).padded(x, zero)
    x = x.transpose(left.input_order(x.ndim))
    folded = x.reshape(*x.shape[:-2], -1, 2 * x.shape[-1])
    joined = jnp.concatenate(
        [lax.slice_in_dim(folded, at, at + pairs, axis=-2) for at in range(reach)], axis=-1
    )
    shape = (*outer, 1, joined.shape[-1], kernel.shape[-1])
    y = multiply(dataclasses.replace(left.channels_last, kernel_shape=shape), joined, kernel)
    y = y.reshape(*y.shape[:-2], 2 * pairs, -1)
    if 2 * pairs > columns:
        y = lax.slice_in_dim(y, 0, columns, axis=-2)
    return from_channels_last(operation, y)


def _window(operation: Convolution) -> list[int]:
    """The extents of the window, one per spatial axis."""
    return [operation.kernel_shape[axis] for axis in operation.dimension_numbers.rhs_spec[2:]]


def _pairs_of(extent: int) -> int:
    """How many pairs of columns two columns of the output read."""
    return (extent + 2) // 2
