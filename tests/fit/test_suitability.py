"""Calibration images that a network was not trained on are told from others by batch norm."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import qjax
from qjax.fit.suitability import divergence
from qjax.graph.batch_norm import Statistics

RNG = np.random.default_rng(0)
CHANNELS = 6
MIXING = RNG.normal(size=(CHANNELS, CHANNELS))
LAYERS = ("fc0", "fc1")


def images(count: int, size: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(1).normal(size=(count, CHANNELS))
    return (size * drawn @ MIXING).astype(np.float32)


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    for name in LAYERS:
        own = params[name]
        y = (x @ own["kernel"] - own["mean"]) * jax.lax.rsqrt(own["var"] + 1e-5)
        x = jax.nn.relu(y * own["scale"] + own["bias"])
    return x


def trained() -> Any:
    """Params whose batch norms know the statistics of many images."""
    params, x = {}, images(10_000)
    for name in LAYERS:
        kernel = RNG.normal(size=(CHANNELS, CHANNELS)).astype(np.float32)
        y = x @ kernel
        scale, bias = RNG.uniform(0.5, 2, CHANNELS), RNG.normal(size=CHANNELS)
        own = {"mean": y.mean(0), "var": y.var(0), "scale": scale, "bias": bias}
        params[name] = {key: value[None].astype(np.float32) for key, value in own.items()}
        params[name]["kernel"] = kernel
        x = np.maximum((y - y.mean(0)) / y.std(0) * scale + bias, 0)
    return params


PARAMS = trained()
NAIVE = qjax.recipe(8).naive()


def test_divergence_is_that_of_normal_distributions():
    known = Statistics(np.float32([1.0, 0.0, 7.0]), np.float32([2.0, 1.0, 0.0]))  # pyright: ignore
    found = divergence(known, np.array([3.0, 0.0, 9.0]), np.array([2.0, 0.5, 3.0]))
    each = [0.5, (0.25 - 1 + np.log(4)) / 2]  # the third channel never varied
    assert found == pytest.approx(np.mean(each))


@pytest.mark.parametrize(("count", "recipe"), [(256, qjax.recipe(8, grid_size=4)), (32, NAIVE)])
def test_images_like_those_in_training_are_not_warned_of(
    count: int, recipe: qjax.Recipe, caplog: pytest.LogCaptureFixture
):
    qjax.quantize(apply_fn, PARAMS, images(count), recipe)
    assert not caplog.records


def test_unlike_images_name_the_layers_and_the_remedy(caplog: pytest.LogCaptureFixture):
    qjax.quantize(apply_fn, PARAMS, images(256, 0.3), NAIVE)
    [record] = caplog.records
    assert "unlike those that the network was trained on" in record.getMessage()
    assert "'fc0'" in record.getMessage() and "Calibrate on images as they" in record.getMessage()


def test_equalized_channels_are_not_compared(caplog: pytest.LogCaptureFixture):
    recipe = dataclasses.replace(NAIVE, equalize=True)
    qjax.quantize(apply_fn, PARAMS, images(256, 0.3), recipe)
    assert not caplog.records


def test_without_batch_norm_nothing_is_known(caplog: pytest.LogCaptureFixture):
    params = {name: PARAMS[name]["kernel"] for name in LAYERS}
    qjax.quantize(lambda p, x: x @ p["fc0"] @ p["fc1"], params, images(256, 0.3), NAIVE)
    assert not caplog.records
