"""One-bit codes −1 and +1: of kernels, real = scale · code; of inputs, their signs."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams, affine_qparams, straight_through
from qjax.formats.base import NumberFormat
from qjax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Binary(QParams):
    """Values ±scale, with codes ±1 and zero point 0; there is no 0.

    Attributes:
      scale: float32, the magnitude of every value; of the rank of the data.
      zero_point: int32 zeros of the same shape.
      qmin: −1.
      qmax: +1.
      dtype: int8 (static).

    Examples:
      >>> import jax.numpy as jnp
      >>> binary = Binary(jnp.float32(0.5), jnp.int32(0), -1, 1)
      >>> binary.bits, binary.encode(jnp.array([0.1, -2.0, 0.0])).tolist()
      (1, [1, -1, 1])
      >>> print(binary.project(jnp.array([0.1, -2.0, 0.0])))
      [ 0.5 -0.5  0.5]

    References:
      Rastegari et al., 2016, arXiv:1603.05279, section 3.1.
    """

    name: ClassVar[str] = "binary"
    spacing: ClassVar[int] = 2

    @property
    def bits(self) -> int:
        """1."""
        return 1

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps real values to their signs, 0 to +1."""
        return signs(x).astype(self.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to ±scale.

        The gradient passes where |x| ≤ scale; that of the scale is the one of learned steps.
        """
        inside = jnp.clip(x * self.inverse_scale, -1, 1)
        return (self.scale * straight_through(signs(inside), inside)).astype(x.dtype)


@pytree
@dataclasses.dataclass(frozen=True)
class Signs:
    """Inputs of a layer as signs: of every patch, sign(x − t) times the mean of |x − t|.

    Attributes:
      shift: t, float32 per input channel, of the rank of the input.

    References:
      Rastegari et al., 2016, arXiv:1603.05279, section 3.2: t is the mean that the batch norm
      before a binarization takes away.
    """

    shift: jax.Array

    name: ClassVar[str] = "signs"
    is_uniform: ClassVar[bool] = False
    bits: ClassVar[int] = 1
    lowest: ClassVar[int] = -1


def signs(x: jax.Array) -> jax.Array:
    """±1 of the type of `x`, +1 for 0."""
    return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))


def _cover(low: jax.Array, high: jax.Array, spec: Any, limits: Any) -> Binary:
    """Magnitudes as great as the greatest value: searches shrink them."""
    covering = affine_qparams(low, high, spec, limits)
    return Binary(**vars(covering))


BINARY = NumberFormat(
    "binary",
    Binary,
    lambda spec: (np.int32(-1), np.int32(1)),
    _cover,
    is_uniform=True,
    widths=range(1, 2),
)
