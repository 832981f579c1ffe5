"""One product of two activations, quantized: its grids, and its evaluation in float arithmetic."""

from typing import NamedTuple

import jax

from qjax.formats.affine import QParams, cast, float_codes, round_codes
from qjax.graph import jaxpr
from qjax.graph.matmuls import Matmul, MatrixProduct

OPERANDS = ("lhs", "rhs")  # fields of a matmul that are read


class QuantizedMatmul(NamedTuple):
    """The grids of one product of two activations, scalars.

    Attributes:
      lhs: of its first operand.
      rhs: of its second operand.
      outputs: of its result, None in float.
    """

    lhs: QParams
    rhs: QParams
    outputs: QParams | None

    @property
    def unit(self) -> jax.Array:
        """The real value of one unit of the accumulator, s_a·s_b."""
        return self.lhs.scale * self.rhs.scale

    @property
    def formats(self) -> dict[str, QParams]:
        """Its grids by field, without those of what stays in float."""
        return {field: grid for field, grid in self._asdict().items() if grid is not None}


def apply_matmul(
    product: MatrixProduct, matmul: QuantizedMatmul, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """Evaluates a product up to its result on its grid.

    The products are taken between codes and the sum is scaled once:
    y = s_a·s_b·Σ (q_a − z_a)(q_b − z_b), rounded to a code by M = s_a·s_b / s_y. Float32 holds the
    integers up to 2^24 exactly, so this is what integer arithmetic gives.

    Args:
      product: the operation.
      matmul: its grids.
      lhs: float[...], the first operand in real units.
      rhs: float[...], the second operand in real units.

    Returns:
      float32[...], the result in real units.

    References:
      Jacob et al., 2018, arXiv:1712.05877, eq. 3.
    """
    acc = product.evaluate(float_codes(lhs, matmul.lhs), float_codes(rhs, matmul.rhs))
    if matmul.outputs is None:
        return acc * matmul.unit
    codes = round_codes(acc * (matmul.unit * matmul.outputs.inverse_scale), matmul.outputs)
    return matmul.outputs.scale * codes


def fake_matmul(step: Matmul, matmul: QuantizedMatmul, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Evaluates a product in the type that the network gives it."""
    return cast(apply_matmul(step.product, matmul, lhs, rhs), jaxpr.dtype(step.output))
