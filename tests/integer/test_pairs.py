"""Convolutions two columns at a time, against XLA's own in int32."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.graph.operation import Convolution
from qjax.integer import pairs

LAYOUTS = {
    ("NHWC", "HWIO", "NHWC"): (2, 9, 8, 3),
    ("NCHW", "OIHW", "NCHW"): (2, 3, 9, 7),
    ("NHWC", "HWIO", "NCHW"): (2, 5, 6, 3),
    ("NWC", "WIO", "NWC"): (2, 11, 3),
}
SIZES = {"H": 3, "I": 3, "O": 4}


def convolution(layout: Any, extent: int, **fields: Any) -> Convolution:
    x_shape = LAYOUTS[layout]
    shape = tuple((SIZES | {"W": extent})[axis] for axis in layout[1])
    numbers = lax.conv_dimension_numbers(x_shape, shape, layout)
    rank = len(x_shape) - 2
    given = {
        "window_strides": (2, 1)[-rank:],
        "padding": ((1, 0), (0, 0))[-rank:],
        "lhs_dilation": (1, 1)[-rank:],
        "rhs_dilation": (1, 1)[-rank:],
    }
    return Convolution(
        **given | {name: value[-rank:] for name, value in fields.items()},
        dimension_numbers=numbers,
        groups=1,
        kernel_shape=shape,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("extent", [2, 3, 5])
def test_pairs_of_columns_give_the_convolution(layout: Any, extent: int):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 255, LAYOUTS[layout]), jnp.uint8)
    zero = jnp.asarray(7, jnp.uint8)
    edges, steps = [(0, 0), (1, 1), (2, 1), (3, 0)], [(1, 1), (2, 1)]
    for edge, dilation, spread in itertools.product(edges, steps, [(1, 1), (2, 2)]):
        fields = {"padding": ((1, 0), edge), "rhs_dilation": dilation, "lhs_dilation": spread}
        operation = convolution(layout, extent, **fields)
        kernel = jnp.asarray(rng.integers(-127, 127, operation.kernel_shape), jnp.int8)
        assert pairs.has_pairs(operation)
        twice = pairs.kernel_of_pairs(operation, operation.to_matrix(kernel))
        y = pairs.multiply_pairs(operation, x, zero, twice)
        left, padded = operation.padded(x.astype(jnp.int32), zero)
        np.testing.assert_array_equal(y, left.apply(padded, kernel.astype(jnp.int32)))


@pytest.mark.parametrize(
    "fields",
    [{"window_strides": (1, 2)}, {"rhs_dilation": (1, 2)}],
    ids=lambda fields: [*fields][0],
)
def test_columns_that_are_skipped_have_no_pairs(fields: Any):
    assert not pairs.has_pairs(convolution(("NHWC", "HWIO", "NHWC"), 3, **fields))


def test_columns_that_do_not_overlap_have_no_pairs():
    assert not pairs.has_pairs(convolution(("NHWC", "HWIO", "NHWC"), 1))
