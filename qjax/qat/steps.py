"""Straight-through gradients: of rounding, of learned steps, of quantized gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.spec import QuantSpec


def scale_gradient(x: jax.Array, factor: float | jax.Array) -> jax.Array:
    """`x`, with its gradient multiplied by `factor`."""
    return _with_scaled_gradient(x, factor)


@jax.custom_vjp
def _with_scaled_gradient(x: Any, factor: Any) -> Any:
    del factor
    return x


_with_scaled_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, gradient: (gradient * factor, None)
)


def quantize_gradient(x: jax.Array, bits: int) -> jax.Array:
    """`x`, with its gradient rounded to `bits` bits, symmetric up to its greatest magnitude.

    Args:
      x: float[...].
      bits: at least 2.

    References:
      Banner et al., 2018, arXiv:1805.11046, section 4 (8-bit gradients of layer outputs).
    """
    return _with_rounded_gradient(x, bits)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_rounded_gradient(x: Any, bits: int) -> Any:
    del bits
    return x


def _rounded_gradient(bits: int, _: Any, gradient: jax.Array) -> tuple[jax.Array]:
    return (QuantSpec(bits).cover(gradient.min(), gradient.max()).project(gradient),)


_with_rounded_gradient.defvjp(lambda x, bits: (x, None), _rounded_gradient)


def learned_step(step: jax.Array, count: int, top: Any) -> jax.Array:
    """A step that is a parameter: its magnitude, with the gradient scaled by 1 / √(count · top).

    With v̂ = s·round(clip(v / s, q_min, q_max)) and a gradient that passes through the rounding,

      ∂v̂/∂s = round(v / s) − v / s  where q_min < v / s < q_max,  else q_min or q_max.

    Args:
      step: float[...], s.
      count: the values that share one step, of one example.
      top: the greatest magnitude of a code.

    References:
      Esser et al., 2020, arXiv:1902.08153, eq. 3 and section 2.2.
    """
    return scale_gradient(jnp.abs(step), 1.0 / jnp.sqrt(count * jnp.asarray(top, jnp.float32)))
