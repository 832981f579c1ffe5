"""Adam, and the rate of its steps: a linear rise, then half a cosine down to 0."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class State(NamedTuple):
    """What Adam remembers.

    Attributes:
      means: m, running means of the gradients, a pytree as the parameters.
      squares: v, running means of their squares.
    """

    means: Any
    squares: Any


def start(params: Any) -> State:
    """The state before the first step."""
    return State(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))


def update(
    params: Any,
    gradient: Any,
    state: State,
    step: Any,
    rate: Any,
    decays: tuple[float, float] = (0.9, 0.999),
    least: float = 1e-8,
) -> tuple[Any, State]:
    """Takes a step.

      m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,
      p ← p − rate · m̂ / (√v̂ + ε),  m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)

    Args:
      params: p, a pytree of float32[...].
      gradient: g.
      state: m and v.
      step: float32[], steps before this one; t is one more.
      rate: float32[].
      decays: β₁ and β₂.
      least: ε.

    Returns:
      The parameters and the state after the step.

    References:
      Kingma and Ba, 2015, arXiv:1412.6980, algorithm 1.

    Examples:
      >>> p = jnp.float32(1.0)
      >>> p, _ = update(p, 4.0 * p, start(p), jnp.float32(0.0), jnp.float32(0.1))
      >>> print(f"{p:.3f}")
      0.900
    """
    first, second = decays
    mean_unit, square_unit = (1 - jnp.power(jnp.float32(decay), step + 1) for decay in decays)
    means = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state.means, gradient)
    squares = jax.tree.map(
        lambda v, g: second * v + (1 - second) * jnp.square(g), state.squares, gradient
    )

    def moved(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return p - rate * (m / mean_unit) / (jnp.sqrt(v / square_unit) + least)

    return jax.tree.map(moved, params, means, squares), State(means, squares)


def learning_rate(peak: float, steps: int, warmup: int, step: Any) -> jax.Array:
    """The rate of a step: it rises over the first `warmup` steps and falls to 0 at the end.

    Args:
      peak: the greatest rate.
      steps: in all.
      warmup: of them that rise; at least 1 less than `steps`.
      step: float32[], steps before this one.

    Examples:
      >>> [round(float(learning_rate(1.0, 6, 2, jnp.float32(i))), 3) for i in range(6)]
      [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    rise = (step + 1) / max(warmup, 1)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / (steps - warmup)))
    return peak * jnp.where(step < warmup, rise, fall)
