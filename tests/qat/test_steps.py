"""Gradients of quantization against the published equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.formats.affine import QParams
from qjax.qat.kernels import binarize, binary_weights, connected, hard_sigmoid
from qjax.qat.steps import learned_step, quantize_gradient

RNG = np.random.default_rng(0)


@given(
    st.floats(-40, 40, width=32),
    st.floats(0.0625, 4, width=32),
    st.sampled_from([(-7, 7), (0, 15), (-1, 1), (0, 3), (-128, 127)]),
)
def test_the_gradient_of_a_learned_step_is_equation_3_of_lsq(
    v: float, s: float, limits: tuple[int, int]
):
    low, high = limits

    def project(v: jax.Array, s: jax.Array) -> jax.Array:
        return QParams(s, jnp.int32(0), low, high).project(v)

    ratio = np.float32(v) * (np.float32(1) / np.float32(s))
    if min(abs(ratio - low), abs(ratio - high)) < 1e-3:
        return  # at the very edge either side is right
    inside = low < ratio < high
    of_v, of_s = jax.grad(project, (0, 1))(jnp.float32(v), jnp.float32(s))
    expected = np.rint(ratio) - ratio if inside else (low if ratio <= low else high)
    np.testing.assert_allclose(of_v, 1.0 if inside else 0.0, rtol=1e-6)
    np.testing.assert_allclose(of_s, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "top"), [(1, 1), (144, 7), (1024, 255)])
def test_the_gradient_of_a_step_is_scaled_and_its_value_is_not(count: int, top: int):
    step = jnp.float32(0.3)
    assert float(learned_step(step, count, top)) == float(step)
    gradient = jax.grad(lambda s: 5.0 * learned_step(s, count, top))(step)
    np.testing.assert_allclose(gradient, 5 / np.sqrt(count * top), rtol=1e-6)


def test_a_step_is_positive_whatever_training_did_to_it():
    assert float(learned_step(jnp.float32(-0.3), 4, 7)) == float(jnp.float32(0.3))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_rounded_and_values_are_not(bits: int):
    x = jnp.asarray(RNG.normal(size=50), jnp.float32)
    weights = jnp.asarray(RNG.normal(size=50), jnp.float32)
    np.testing.assert_array_equal(quantize_gradient(x, bits), x)
    found = jax.grad(lambda x: jnp.sum(weights * quantize_gradient(x, bits)))(x)
    step = np.abs(weights).max() / np.float32(2 ** (bits - 1) - 1)
    np.testing.assert_allclose(found, step * np.rint(weights / step), rtol=1e-6, atol=1e-7)
    assert len(np.unique(np.rint(found / step))) <= 2**bits - 1


def test_gradients_of_zeros_stay_zeros():
    found = jax.grad(lambda x: jnp.sum(0.0 * quantize_gradient(x, 8)))(jnp.ones(3))
    np.testing.assert_array_equal(found, np.zeros(3))


def test_binary_connect_updates_as_published():
    """W ← clip(w − η ∂C/∂w_b) with w_b = sign(w): Courbariaux et al., 2015, algorithm 1."""
    training = connected(is_stochastic=False)
    w = RNG.uniform(-1, 1, size=(1, 6, 2)).astype(np.float32)
    x, y = (RNG.normal(size=shape).astype(np.float32) for shape in ((9, 6), (9, 2)))
    params = {"kernel": jnp.asarray(w), "slope": jnp.ones((1, 1, 2))}

    def loss(params: dict) -> jax.Array:
        return jnp.sum((x @ training.forward(params, None, None)[0] - y) ** 2)

    rate = 0.2
    gradient = jax.grad(loss)(params)["kernel"]
    updated = training.constrain(params | {"kernel": params["kernel"] - rate * gradient})["kernel"]
    signs = np.where(w >= 0, 1.0, -1.0)[0]
    expected = np.clip(w[0] - rate * 2 * x.T @ (x @ signs - y), -1, 1)
    assert np.any(np.abs(expected) == 1) and np.any(np.abs(expected) < 1)
    np.testing.assert_allclose(updated[0], expected, rtol=1e-4, atol=1e-4)


def test_stochastic_signs_have_the_right_mean():
    values = jnp.array([-1.5, -1.0, -0.6, 0.0, 0.3, 0.9, 1.0])
    draws = 4000
    drawn = jax.vmap(lambda key: binarize(values, key))(jax.random.split(jax.random.key(0), draws))
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    probability = np.asarray(hard_sigmoid(values), np.float64)
    np.testing.assert_allclose(probability, np.clip((np.asarray(values) + 1) / 2, 0, 1), rtol=1e-6)
    error = 2 * np.sqrt(probability * (1 - probability) / draws)
    assert np.all(np.abs(drawn.mean(0) - (2 * probability - 1)) <= 4 * error + 1e-12)


def test_binary_weights_are_those_of_least_error_with_the_published_gradient():
    w = RNG.normal(size=(1, 9, 4)).astype(np.float32)
    weights = RNG.normal(size=w.shape).astype(np.float32)
    scale = np.abs(w).mean(1, keepdims=True)
    np.testing.assert_allclose(binary_weights(w, (1,)), scale * np.where(w >= 0, 1, -1), rtol=1e-6)
    found = jax.grad(lambda w: jnp.sum(weights * binary_weights(w, (1,))))(jnp.asarray(w))
    expected = weights * (1 / 9 + scale * (np.abs(w) <= 1))
    assert np.any(np.abs(w) > 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
