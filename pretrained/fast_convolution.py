"""Convolution as a few large matrix products, for training on a CPU.

XLA's CPU backend differentiates small convolutions slowly, and far more slowly inside `lax.scan`.
Here images lie as [C, H, W, N]: every shift is then a copy of long runs and every elementwise loop
vectorizes over the batch. Rows of a 3x3 convolution go through the Winograd form F(m, 3), columns
through shifted copies (im2col), which leaves m + 2 products of (C_out, 3 * C_in) by
(3 * C_in, H / m * W * N) for every m rows of output:

  Y = A^T [ sum_j (G w_j)^T (B^T x_{.+j}) ]

Both gradients are products of the same kind. Values equal those of `lax.conv_general_dilated` up to
rounding.

References:
  Lavin and Gray, 2016, arXiv:1509.09308, section 4.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Transform(NamedTuple):
    """The matrices of F(m, 3): B^T float[m+2, m+2], G float[m+2, 3] and A^T float[m, m+2]."""

    inputs: np.ndarray
    kernel: np.ndarray
    outputs: np.ndarray


F2 = Transform(
    inputs=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    kernel=np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]]),
    outputs=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
)
F4 = Transform(
    inputs=np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
    kernel=np.array(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    ),
    outputs=np.array(
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    ),
)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolves images in the layout [C, H, W, N].

    Args:
      x: float[C_in, H, W, N].
      kernel: float[r, r, C_in, C_out].
      stride: of rows and columns.
      padding: zeros on each of the four sides.

    Returns:
      float[C_out, H', W', N].
    """
    if kernel.shape[0] == 3 and stride == padding == 1 and x.shape[1] % 2 == 0:
        return _winograd(F4 if x.shape[1] % 4 == 0 else F2, x, kernel)
    return _im2col(x, kernel, stride, padding)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dimension_numbers=None,
    feature_group_count: int = 1,
    **kwargs,
) -> jax.Array:
    """Stands in for `lax.conv_general_dilated` in an undilated, ungrouped `nn.Conv`.

    Args:
      lhs: images float[N, H, W, C_in].
      rhs: kernel float[r, r, C_in, C_out].
      window_strides: of rows and columns, equal.
      padding: (before, after) of rows and columns, all four equal.
      dimension_numbers: ignored: always NHWC and HWIO, as `nn.Conv` has them.
      feature_group_count: must be 1.
      **kwargs: ignored: `nn.Conv` also passes dilations of 1 and the precision.

    Returns:
      float[N, H', W', C_out].
    """
    del dimension_numbers, kwargs
    assert feature_group_count == 1 and len({p for pair in padding for p in pair}) == 1
    x = convolve(lhs.transpose(3, 1, 2, 0), rhs, window_strides[0], padding[0][0])
    return x.transpose(3, 1, 2, 0)


def _im2col(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolves by one product with unfolded patches float[r * r * C_in, H' * W' * N]."""
    size, _, channels, features = kernel.shape
    x = _pad(x, padding)
    h, w = ((side - size) // stride + 1 for side in x.shape[1:3])
    rows, columns = ((side - 1) * stride + 1 for side in (h, w))
    patches = [
        x[:, i : i + rows : stride, j : j + columns : stride].reshape(channels, -1)
        for i in range(size)
        for j in range(size)
    ]
    y = kernel.reshape(-1, features).T @ jnp.concatenate(patches)
    return y.reshape(features, h, w, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _winograd(transform: Transform, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves 3x3 with stride 1 and padding 1, for H divisible by m."""
    m, (_, h, w, n), features = len(transform.outputs), x.shape, kernel.shape[-1]
    u = jnp.einsum("ai,ijco->aojc", jnp.asarray(transform.kernel, x.dtype), kernel)
    u = u.reshape(m + 2, features, -1)
    products = [u_a @ v_a for u_a, v_a in zip(u, _tiles(transform, x), strict=True)]
    rows = [row.reshape(features, h // m, w, n) for row in _combine(transform.outputs, products)]
    return jnp.stack(rows, axis=2).reshape(features, h, w, n)


def _winograd_forward(transform: Transform, x: jax.Array, kernel: jax.Array):
    return _winograd(transform, x, kernel), (x, kernel)


def _winograd_backward(transform: Transform, residuals, gradient: jax.Array):
    """Dx convolves dY with the turned kernel; dw_j = G^T [ (B^T x_{.+j}) (A dY)^T ]."""
    x, kernel = residuals
    dx = _winograd(transform, gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    m, features = len(transform.outputs), kernel.shape[-1]
    rows = [gradient[:, i::m].reshape(features, -1) for i in range(m)]
    tiles = zip(_tiles(transform, x), _combine(transform.outputs.T, rows), strict=True)
    du = jnp.stack([v_a @ d_a.T for v_a, d_a in tiles]).reshape(m + 2, *kernel.shape[1:])
    return dx, jnp.einsum("ai,ajco->ijco", jnp.asarray(transform.kernel, x.dtype), du)


_winograd.defvjp(_winograd_forward, _winograd_backward)


def _tiles(transform: Transform, x: jax.Array) -> list[jax.Array]:
    """B^T x over rows, three shifts over columns: m+2 arrays float[3 * C_in, H / m * W * N]."""
    m, (channels, h, w, _) = len(transform.outputs), x.shape
    x = _pad(x, 1)
    rows = _combine(transform.inputs, [x[:, i : i + h - m + 1 : m] for i in range(m + 2)])
    return [
        jnp.concatenate([v[:, :, j : j + w].reshape(channels, -1) for j in range(3)]) for v in rows
    ]


def _pad(x: jax.Array, padding: int) -> jax.Array:
    """Zeros around [C, H, W, N]."""
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _combine(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiplies a small constant matrix with a list of arrays, leaving out the zeros."""
    combined = []
    for row in matrix:
        terms = [float(a) * array for a, array in zip(row, arrays, strict=True) if a != 0]
        combined.append(sum(terms[1:], terms[0]))
    return combined
