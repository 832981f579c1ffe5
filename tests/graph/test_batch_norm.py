"""The statistics of batch norm: those of the layer's output, in every framework."""

from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from qjax.graph.batch_norm import Statistics, output_statistics
from qjax.graph.layers import find_layers
from qjax.graph.naming import path_names

CASES = {case.id: case for case in models.CASES}
EPSILON = 1e-5  # of all frameworks
LINEN = "params/BatchNorm_0/{}", "batch_stats/BatchNorm_0/{}"


@pytest.mark.parametrize(
    ("id", "layer", "beta", "gamma", "variance"),
    [
        ("linen_cnn", "Conv_0", *map(LINEN[0].format, ("bias", "scale")), LINEN[1].format("var")),
        ("nnx_cnn", "conv", "norm/bias/value", "norm/scale/value", "norm/var/value"),
        ("equinox_cnn", "model/conv", "model/norm/bias", "model/norm/weight", "state/1/1"),
        (
            "haiku_cnn",
            "stem/~/conv",
            "params/stem/norm/offset",
            "params/stem/norm/scale",
            "state/stem/norm/~/var_ema/average",
        ),
    ],
)
def test_the_mean_is_beta_and_the_deviation_gamma(
    id: str, layer: str, beta: str, gamma: str, variance: str
):
    params, leaves = CASES[id].params, jax.tree.leaves(CASES[id].params)
    by_path = dict(zip(path_names(params), leaves, strict=True))
    found = output_statistics(find_layers(CASES[id].apply_fn, params, CASES[id].x), leaves)[layer]
    mean, scale, var = (np.ravel(by_path[path]) for path in (beta, gamma, variance))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
    expected = np.abs(scale) * np.sqrt(var / (var + EPSILON))
    np.testing.assert_allclose(found.deviation, expected, rtol=1e-4)


def normalized(params: Any, x: jax.Array) -> jax.Array:
    """A layer whose batch norm is followed by a channel's sign and shift, and one without any."""
    y = (x @ params["w"] + params["b"] - params["mean"]) / jnp.sqrt(params["var"] + 0.5)
    return params["after"] - params["gamma"] * y


def statistics_of_normalized(variance: float) -> Statistics:
    vectors = {"b": 7.0, "mean": 3.0, "var": variance, "gamma": -4.0, "after": 1.0}
    params = {"w": jnp.ones((2, 3))} | {k: jnp.full((1, 3), v) for k, v in vectors.items()}
    network = find_layers(normalized, params, jnp.ones((4, 2)))
    [found] = output_statistics(network, jax.tree.leaves(params)).values()
    return found


def test_what_follows_batch_norm_counts_and_its_epsilon_is_taken_out():
    found = statistics_of_normalized(2.0)
    np.testing.assert_allclose(found.mean, 1.0)
    np.testing.assert_allclose(found.deviation, 4 * np.sqrt(2.0 / 2.5), rtol=1e-6)


def test_a_dead_channel_has_the_deviation_0():
    np.testing.assert_array_equal(statistics_of_normalized(0.0).deviation, 0.0)


def test_other_scales_are_not_taken_for_batch_norm():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        y = x @ params["w"] * jax.lax.rsqrt(params["var"] + EPSILON)  # nothing is subtracted
        z = (jax.nn.relu(y) @ params["w"] - params["mean"]) * params["gamma"]  # no root
        return jax.nn.relu(z) @ params["w"] - jax.lax.rsqrt(params["var"])

    params = {"w": jnp.ones((3, 3))}
    params |= {name: jnp.full((1, 3), 2.0) for name in ("var", "mean", "gamma")}
    network = find_layers(apply_fn, params, jnp.ones((4, 3)))
    assert len(network.sites) == 3
    assert output_statistics(network, jax.tree.leaves(params)) == {}
