"""The table of linear operations: every way in which a convolution or a dot product is written."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

from qjax.graph.operation import Convolution, Linear, linear_operation


class Case(NamedTuple):
    """An operation and what qjax must read from its equation."""

    id: str
    function: Callable[[jax.Array, jax.Array], jax.Array]
    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    kind: str
    matrix_shape: tuple[int, int, int]
    kernel_is_lhs: bool = False

    @property
    def x(self) -> jax.Array:
        """A random input whose elements have unequal means, so that H is no multiple of 1."""
        rng = np.random.default_rng(1)
        values = rng.normal(size=self.x_shape) + rng.normal(size=self.x_shape[1:])
        return jax.numpy.asarray(values, np.float32)

    @property
    def kernel(self) -> jax.Array:
        """A random kernel."""
        values = np.random.default_rng(2).normal(size=self.kernel_shape)
        return jax.numpy.asarray(values, np.float32)

    @property
    def operation(self) -> Linear:
        """What qjax makes of the equation."""
        operands = (self.kernel, self.x) if self.kernel_is_lhs else (self.x, self.kernel)
        [equation] = jax.make_jaxpr(self.function)(*operands).eqns
        operation = linear_operation(equation, self.kernel_is_lhs)
        assert operation is not None
        return operation


def conv(layout: str, strides: tuple[int, ...], padding: object, **options: object) -> Callable:
    """`lax.conv_general_dilated` with its layouts as one string, `NHWC HWIO NHWC`."""
    return partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=tuple(layout.split()),
        **options,
    )


def dot(contracting: tuple, batch: tuple = ((), ())) -> Callable:
    """`lax.dot_general` with these dimension numbers."""
    return partial(lax.dot_general, dimension_numbers=(contracting, batch))


NHWC = "NHWC HWIO NHWC"
CASES = (
    Case("strided", conv(NHWC, (2, 1), "SAME"), (2, 5, 6, 3), (3, 2, 3, 4), "conv", (1, 18, 4)),
    Case(
        "dilated",
        conv(NHWC, (1, 1), ((2, 1), (0, 3)), rhs_dilation=(2, 3)),
        (2, 5, 6, 3),
        (2, 2, 3, 4),
        "conv",
        (1, 12, 4),
    ),
    Case(
        "lhs_dilated",
        conv(NHWC, (1, 1), ((1, 2), (2, 2)), lhs_dilation=(2, 3)),
        (2, 3, 3, 3),
        (3, 3, 3, 4),
        "conv",
        (1, 27, 4),
    ),
    Case(
        "cropped",
        conv(NHWC, (1, 2), ((-1, 0), (1, -1))),
        (2, 5, 6, 3),
        (2, 2, 3, 4),
        "conv",
        (1, 12, 4),
    ),
    Case(
        "grouped",
        conv(NHWC, (1, 1), "VALID", feature_group_count=2),
        (2, 5, 6, 4),
        (3, 2, 2, 6),
        "grouped_conv",
        (2, 12, 3),
    ),
    Case(
        "depthwise",
        conv(NHWC, (1, 2), "SAME", feature_group_count=3),
        (2, 5, 6, 3),
        (3, 3, 1, 6),
        "depthwise_conv",
        (3, 9, 2),
    ),
    Case(
        "kernel_per_channel",
        conv(NHWC, (2, 1), ((1, 2), (-1, 1)), lhs_dilation=(1, 2), feature_group_count=3),
        (2, 5, 6, 3),
        (3, 2, 1, 3),
        "depthwise_conv",
        (3, 6, 1),
    ),
    Case(
        "kernel_per_channel_mixed",
        conv("NHCW OWHI NWHC", (1, 2), "SAME", rhs_dilation=(2, 1), feature_group_count=3),
        (2, 7, 3, 6),
        (3, 2, 3, 1),
        "depthwise_conv",
        (3, 6, 1),
    ),
    Case(
        "channels_first",
        conv("NCHW OIHW NCHW", (2, 2), "SAME", feature_group_count=2),
        (2, 4, 5, 6),
        (6, 2, 3, 3),
        "grouped_conv",
        (2, 18, 3),
    ),
    Case(
        "mixed_layout",
        conv("NHCW OWHI NWHC", (1, 2), "SAME", rhs_dilation=(1, 2)),
        (2, 5, 3, 6),
        (4, 2, 3, 3),
        "conv",
        (1, 18, 4),
    ),
    Case(
        "one_dimensional",
        conv("NWC WIO NWC", (2,), "SAME"),
        (3, 9, 3),
        (4, 3, 5),
        "conv",
        (1, 12, 5),
    ),
    Case("dot_rhs", dot(((1,), (0,))), (7, 5), (5, 4), "dense", (1, 5, 4)),
    Case("dot_lhs", dot(((1,), (1,))), (7, 5), (4, 5), "dense", (1, 5, 4), True),
    Case("dot_two_axes", dot(((1, 3), (2, 0))), (3, 4, 5, 2), (2, 3, 4), "dense", (1, 8, 3)),
    Case("dot_two_channel_axes", dot(((2,), (1,))), (3, 4, 5), (2, 5, 3), "dense", (1, 5, 6)),
    Case(
        "grouped_dot_rhs",
        dot(((2,), (1,)), ((1,), (0,))),
        (7, 3, 4),
        (3, 4, 5),
        "grouped_dense",
        (3, 4, 5),
    ),
    Case(
        "grouped_dot_lhs",
        dot(((2,), (2,)), ((0,), (1,))),
        (7, 3, 4),
        (3, 5, 4),
        "grouped_dense",
        (3, 4, 5),
        True,
    ),
)


@partial(jax.jit, static_argnums=0)
def patches(operation: Linear, x: jax.Array) -> jax.Array:
    """`operation.patches`, compiled once per operation for all tests."""
    return operation.patches(x)


@partial(jax.jit, static_argnums=0)
def apply(operation: Linear, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`operation.apply`, compiled."""
    return operation.apply(x, kernel)


def by_channel(operation: Linear, y: jax.Array | np.ndarray) -> np.ndarray:
    """Brings an operation's output to float[positions, groups, channels], in patches' order."""
    if isinstance(operation, Convolution):
        batch, feature, *spatial = operation.dimension_numbers.out_spec
        order = (batch, *spatial, feature)
    else:
        channels = [axis % y.ndim for axis in operation.channel_axes]
        order = (*(axis for axis in range(y.ndim) if axis not in channels), *channels)
    groups, _, channels = operation.matrix_shape
    return np.asarray(y).transpose(order).reshape(-1, groups, channels)
