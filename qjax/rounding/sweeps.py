"""Coordinate sweeps: codes and scales improved in turn, each with all else fixed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.base import element, elementwise
from qjax.formats.scales import FREE
from qjax.rounding.metric import damped


def coordinate_sweeps(
    codes: jax.Array,
    kernel: jax.Array,
    hessian: jax.Array,
    format: Any,
    sweeps: int,
    nearest_ratio: Callable[[jax.Array], jax.Array] = FREE.nearest_ratio,
) -> tuple[jax.Array, Any]:
    """Improves codes and scales in turn: each step has the least eᵀ H e with all else fixed.

    Scales: s = (qᵀ H w) / (qᵀ H q) per output channel, where a channel has one scale. Codes: with
    g = H (ŵ − w), the best value of element k is ŵ_k − g_k / H_kk, rounded to the format.

    Args:
      codes: [groups, patch, channels].
      kernel: w, float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch].
      format: a `Format` of shape [groups or 1, patch groups, channels or 1].
      sweeps: how many times over all elements.
      nearest_ratio: of the scales that there may be, see `qjax.formats.scales`.

    Returns:
      Codes and format of the same shapes.

    References:
      Zhang et al., 2024, arXiv:2403.07134 (COMQ).
    """
    metric = damped(hessian, 1e-4)
    diagonal = jnp.diagonal(metric, axis1=1, axis2=2)
    patch = kernel.shape[1]

    def refit(values: jax.Array, format: Any) -> Any:
        weighted = jnp.matmul(metric, values, precision="highest")
        fit = jnp.sum(weighted * kernel, 1, keepdims=True)
        energy = jnp.sum(weighted * values, 1, keepdims=True)
        factor = jnp.where((energy > 0) & (fit > 0), fit / jnp.where(energy > 0, energy, 1.0), 1.0)
        return format.scaled(nearest_ratio(factor))

    has_own_scale = format.step.shape == (kernel.shape[0], 1, kernel.shape[2])

    def sweep(_: int, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        values, format = state
        if has_own_scale:
            refitted = refit(values, format)
            values = values * (refitted.step / format.step)
            format = refitted
        formats = elementwise(format, patch)
        gradient = jnp.matmul(metric, values - kernel, precision="highest")

        def do_element(
            k: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            values, gradient = state
            old = values[:, k]
            best = old - gradient[:, k] / diagonal[:, k, None]
            rounded = element(formats, k).project(best)
            change = rounded - old
            return values.at[:, k].set(rounded), gradient + metric[:, :, k, None] * change[:, None]

        values, _gradient = lax.fori_loop(0, patch, do_element, (values, gradient))
        return values, format

    values = elementwise(format, patch).decode(codes)
    values, format = lax.fori_loop(0, sweeps, sweep, (values, format))
    return elementwise(format, patch).encode(values), format
