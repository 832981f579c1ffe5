"""Whether this device multiplies bytes right, tried on a small convolution."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_logger = logging.getLogger(__name__)


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
