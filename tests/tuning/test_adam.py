"""Adam against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.tuning import adam


def test_steps_follow_the_equations():
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    p = {"a": jnp.ones(2), "b": jnp.ones(1)}
    state = adam.start(p)
    expected, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    for step, g in enumerate(gradients):
        gradient = {"a": jnp.asarray(g[:2]), "b": jnp.asarray(g[2:])}
        p, state = adam.update(p, gradient, state, jnp.float32(step), jnp.float32(0.1))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        mean, square = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        expected -= 0.1 * mean / (np.sqrt(square) + 1e-8)
    found = np.concatenate(jax.tree.leaves(p))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [float(adam.learning_rate(0.5, 100, 10, jnp.float32(step))) for step in range(101)]
    assert np.argmax(rates) in (9, 10) and max(rates) == 0.5
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[100] < 1e-6
    assert float(adam.learning_rate(0.5, 1, 0, jnp.float32(0))) == 0.5
