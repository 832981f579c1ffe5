"""Equalization: it changes nothing in float, and evens out what the second layer sees."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

import qjax
from qjax.fit.equalize import equalizable_pairs
from qjax.graph.layers import find_layers

CASES = {case.id: case for case in models.CASES}
PAIRS = {
    "linen_cnn": [("Dense_0", "Dense_1")],
    "linen_resnet": [("block0/conv1", "block0/conv2"), ("block1/conv1", "block1/conv2")],
    "linen_mobilenet": [("project", "grouped")],
    "linen_transformer": [],
    "haiku_cnn": [("stem/~/conv", "depthwise")],
    "plain_nchw": [("w1", "w2")],
    "plain_mlp": [("0", "1"), ("1", "2")],
    "shared_kernel": [("w", "w@1"), ("w@1", "w@2")],
}


@pytest.mark.parametrize("id", PAIRS)
def test_the_pairs_are_found(id: str):
    case = CASES[id]
    network = find_layers(case.apply_fn, case.params, case.x)
    names = [site.layer.name for site in network.sites]
    found = [(names[first], names[second]) for first, second in equalizable_pairs(network)]
    assert found == PAIRS[id]


@pytest.mark.parametrize("id", ["linen_resnet", "haiku_cnn", "shared_kernel"])
def test_float_is_not_changed(id: str):
    case = CASES[id]
    recipe = qjax.Recipe(weights=None, inputs=None, outputs=None, equalize=True)
    q = qjax.quantize(case.apply_fn, case.params, case.x, recipe)
    np.testing.assert_allclose(
        q.apply_fn(q.params, case.x), case.apply_fn(case.params, case.x), rtol=1e-4, atol=1e-4
    )


def test_activations_and_weights_meet_halfway():
    key = jax.random.key(0)
    params = {
        "first": jax.random.normal(key, (8, 16)) * jnp.logspace(-2, 2, 16).reshape(1, 16),
        "second": jax.random.normal(key, (16, 4)),
    }
    x = jax.random.normal(key, (64, 8))

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    recipe = qjax.Recipe(weights=None, inputs=None, outputs=None, equalize=True)
    layers = qjax.quantize(apply_fn, params, x, recipe).params["layers"]
    activations = jax.nn.relu(x @ layers["first"].kernel[0]).max(0)
    weights = jnp.abs(layers["second"].kernel[0]).max(1)
    np.testing.assert_allclose(activations, weights, rtol=1e-4)
