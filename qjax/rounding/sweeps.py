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
    refit: Callable[..., tuple[jax.Array, Any]] | None = None,
) -> tuple[jax.Array, Any]:
    """Improves codes and scales in turn: each step has the least eᵀ H e with all else fixed.

    Scales: s = (qᵀ H w) / (qᵀ H q) per output channel, where a channel has one scale; of a fitted
    codebook all levels, and these once more in the end. Codes: with g = H (ŵ − w), the best value
    of element k is ŵ_k − g_k / H_kk, rounded to the format.

    Args:
      codes: [groups, patch, channels].
      kernel: w, float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch].
      format: a `Format` of shape [groups or 1, patch groups, channels or 1].
      sweeps: how many times over all elements.
      nearest_ratio: of the scales that there may be, see `qjax.formats.scales`.
      refit: what fits the format in place of a scale, see `NumberFormat`.

    Returns:
      Codes and format of the same shapes.

    References:
      Zhang et al., 2024, arXiv:2403.07134 (COMQ).
    """
    metric = damped(hessian, 1e-4)
    diagonal = jnp.diagonal(metric, axis1=1, axis2=2)
    patch = kernel.shape[1]

    def rescale(values: jax.Array, kernel: jax.Array, metric: jax.Array, format: Any) -> Any:
        if format.step.shape != (kernel.shape[0], 1, kernel.shape[2]):
            return values, format
        weighted = jnp.matmul(metric, values, precision="highest")
        fit = jnp.sum(weighted * kernel, 1, keepdims=True)
        energy = jnp.sum(weighted * values, 1, keepdims=True)
        factor = jnp.where((energy > 0) & (fit > 0), fit / jnp.where(energy > 0, energy, 1.0), 1.0)
        refitted = format.scaled(nearest_ratio(factor))
        return values * (refitted.step / format.step), refitted

    improve = refit or rescale

    def sweep(_: int, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        values, format = improve(state[0], kernel, metric, state[1])
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
    if refit is not None:
        values, format = refit(values, kernel, metric, format)
    return elementwise(format, patch).encode(values), format
