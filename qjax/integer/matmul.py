"""Products of two activations on integers: int8 operands, an int32 accumulator.

With codes q_a and q_b of the operands and their zero points, over the K products of an element,

  acc = Σ (q_a − z_a)(q_b − z_b) = Σ q_a·q_b − z_b·Σ q_a − z_a·Σ q_b + K·z_a·z_b.

The first sum is a product of matrices of int8; the others are sums over the rows of one operand and
the columns of the other. All is modulo 2^32, and the accumulator lies within.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import cast
from qjax.graph import jaxpr
from qjax.graph.matmuls import Matmul, MatrixProduct
from qjax.integer.codes import Codes, GridKey, grid_key, requantized, to_grid
from qjax.integer.lowerings import INT_LIMIT
from qjax.integer.requantize import Arithmetic
from qjax.run.matmul import QuantizedMatmul


class MatmulPlan(NamedTuple):
    """What the program of a product depends on, apart from shapes and types: hashable.

    Attributes:
      lhs: the grid of its first operand.
      rhs: the grid of its second operand.
      outputs: the grid of its result, None in float.
      limit: the greatest magnitude of its accumulator.
    """

    lhs: GridKey
    rhs: GridKey
    outputs: GridKey | None
    limit: int


def plan_matmul(step: Matmul, matmul: QuantizedMatmul) -> MatmulPlan:
    """Plans a product.

    Raises:
      ValueError: its accumulator can leave 32 bits.
    """
    lhs, rhs, outputs = map(grid_key, matmul)
    assert lhs is not None and rhs is not None
    limit = step.depth * _greatest(lhs) * _greatest(rhs)
    if limit >= INT_LIMIT:
        raise ValueError(
            f"matmul {step.name!r} can reach {limit:,} in its accumulator, beyond 32 bits; use "
            f"fewer bits for its operands: overrides={{{step.name!r}: {{'input_bits': 8}}}}."
        )
    return MatmulPlan(lhs, rhs, outputs, limit)


def _greatest(key: GridKey) -> int:
    """What no magnitude of a code less the zero point exceeds."""
    [zero_point] = key.zero_points
    return max(zero_point - key.qmin, key.qmax - zero_point)


def accumulate(product: MatrixProduct, lhs: Codes, rhs: Codes) -> jax.Array:
    """Computes the accumulator, zero points of both operands taken off: int32[...]."""
    common = np.promote_types(lhs.codes.dtype, rhs.codes.dtype)
    given = [operand.codes.astype(common) for operand in (lhs, rhs)]
    acc = product.apply(*given, preferred_element_type=jnp.int32)
    ranks = lhs.codes.ndim, rhs.codes.ndim
    pairs = zip(given, product.batch, product.free(ranks), product.contracting, strict=True)
    sums = []
    for side, (codes, batch, free, contracting) in enumerate(pairs):
        rows = codes.transpose(*batch, *free, *contracting).astype(jnp.int32)
        kept = len(batch) + len(free)
        total = jnp.sum(rows, axis=tuple(range(kept, codes.ndim)), dtype=jnp.int32)
        sums.append(product.along_result(side, total, ranks))
    depth = np.prod([lhs.codes.shape[axis] for axis in product.contracting[0]], dtype=np.int32)
    z_a, z_b = lhs.zero_point, rhs.zero_point
    return acc - z_b * sums[0] - z_a * sums[1] + depth * z_a * z_b


def multiply_codes(
    step: Matmul,
    matmul: QuantizedMatmul,
    plan: MatmulPlan,
    values: tuple[Codes | jax.Array, Codes | jax.Array],
    arithmetic: Arithmetic,
) -> Codes | jax.Array:
    """Evaluates a product on the codes of its operands.

    Args:
      step: the product and where it stands.
      matmul: its grids.
      plan: of it.
      values: of its operands, codes on any grid or real.
      arithmetic: of requantization.

    Returns:
      Codes of the result, or a sum; real values in `float` arithmetic where the result has no grid.
    """
    lhs, rhs = (
        to_grid(value, grid, key, arithmetic, jaxpr.dtype(var))
        for value, grid, key, var in zip(
            values, (matmul.lhs, matmul.rhs), (plan.lhs, plan.rhs), step.operands, strict=True
        )
    )
    acc, dtype = accumulate(step.product, lhs, rhs), jaxpr.dtype(step.output)
    found = requantized(
        acc, matmul.unit, matmul.outputs, plan.outputs, plan.limit, dtype, arithmetic
    )
    return found if isinstance(found, Codes) else cast(found, dtype)
