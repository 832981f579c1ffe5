"""Samples of what flows through a layer, spread evenly over all calibration images and positions.

Values are stacked by batch, [batches, examples, ...].
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph.operation import Linear
from qjax.sharing import shared

# Samples per layer.
MOMENT_PATCHES = 2**16  # for the second moments of its input
SAMPLED_PATCHES = 2**12  # for the search of its input range
SAMPLED_VALUES = 2**18  # for the search of its output range, or of ranges per channel


def coprime_stride(size: int, limit: int) -> int:
    """The least stride that leaves at most `limit` of `size` elements and meets every channel."""
    stride = max(1, math.ceil(size / limit))
    while math.gcd(stride, size) != 1:
        stride += 1
    return stride


def patch_stride(operation: Linear, values: Any, limit: int, batches: int | None = None) -> int:
    """The stride between positions that leaves about `limit` patches of all the batches.

    Args:
      operation: the linear operation.
      values: its input, [batches, examples, ...], or the shape of it.
      limit: patches.
      batches: how many there are in all; by default those of `values`.
    """
    batch = jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
    positions = jax.eval_shape(operation.patches, batch).shape[0]
    return coprime_stride(positions, max(1, limit // (batches or len(values))))


def sampled(values: jax.Array, batches: int | None = None) -> jax.Array:
    """Elements at pseudo-random places, the same for all arrays of one size; all, if there are few.

    Their number, and with it what has to be compiled, does not depend on the size of the arrays.

    Args:
      values: [batches, examples, ...].
      batches: how many there are in all; by default those of `values`.

    Returns:
      The elements, [n].
    """
    flat = values.reshape(len(values), -1)
    size, limit = flat.shape[1], SAMPLED_VALUES // (batches or len(values))
    if size > limit:
        flat = flat[:, np.random.default_rng(size).integers(size, size=limit)]
    return shared(flat.reshape(-1), is_returned=True)


def sampled_channels(axes: Sequence[int], values: jax.Array) -> jax.Array:
    """Values at pseudo-random positions, the same for all arrays of one size: [channels, n].

    Args:
      axes: the axes of a batch that hold the channels.
      values: [batches, examples, ...].
    """
    own = [1 + axis % (values.ndim - 1) for axis in axes]
    rest = [axis for axis in range(1, values.ndim) if axis not in own]
    channels = math.prod(values.shape[axis] for axis in own)
    by_batch = values.transpose(*own, 0, *rest).reshape(channels, len(values), -1)
    size = by_batch.shape[2]
    limit = max(1, SAMPLED_VALUES // channels // len(values))
    if size > limit:
        by_batch = by_batch[:, :, np.random.default_rng(size).integers(size, size=limit)]
    return by_batch.reshape(channels, -1)


def sampled_patches(operation: Linear, values: jax.Array, batches: int | None = None) -> jax.Array:
    """Patches of a layer's input at positions at an even stride, float32[groups, patch, n]."""
    stride = patch_stride(operation, values, SAMPLED_PATCHES, batches)
    floats = values.astype(jnp.float32)
    patches = jax.vmap(lambda batch: operation.patches(batch, stride))(floats)
    columns = patches.reshape(-1, *patches.shape[2:]).transpose(1, 2, 0)
    return shared(columns, 2, is_returned=batches is not None)
