"""Channels whose weights are tiny next to their bias, and kernels of unusual magnitudes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.fit.layer import Fit
from qjax.report import layer_report

CHEAP = qjax.Recipe().naive()
FEATURES, HIDDEN, CLASSES = 6, 8, 4


def network(params: Any, x: jax.Array) -> jax.Array:
    y = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return y @ params["head"]["w"] + params["head"]["b"]


def make_params() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    hidden = {"w": rng.normal(size=(FEATURES, HIDDEN)), "b": rng.normal(size=(1, HIDDEN)) / 4}
    head = {"w": rng.normal(size=(HIDDEN, CLASSES)), "b": rng.normal(size=(1, CLASSES)) / 4}
    return jax.tree.map(np.float32, {"hidden": hidden, "head": head})


def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(48, FEATURES)).astype(np.float32)


def check(params: Any, recipe: qjax.Recipe, decibels: float) -> qjax.Quantized:
    """Quantizes; float, fake quantization and integers must agree as well as they usually do."""
    x = images()
    q = qjax.quantize(network, params, x, recipe)
    assert min(float(layer.output_sqnr_db or 0) for layer in q.report) > decibels
    assert float(qjax.sqnr_db(network(params, x), q.apply_fn(q.params, x))) > decibels
    integer = qjax.integer(q)
    jax.tree.map(
        np.testing.assert_array_equal, q.apply_fn.codes(q.params, x), integer.codes(q.params, x)
    )
    return q


@pytest.mark.parametrize("recipe", [CHEAP, qjax.Recipe()], ids=["naive", "default"])
def test_a_dead_channel_keeps_its_bias(recipe: qjax.Recipe):
    params = make_params()
    params["hidden"]["w"][:, 2] *= 1e-9
    params["hidden"]["b"][0, 2] = 0.5
    params["head"]["w"][:, 1] *= 1e-9
    params["head"]["b"][0, 1] = 1.0
    q = check(params, recipe, 30)
    logits = q.apply_fn(q.params, images())
    np.testing.assert_allclose(logits[:, 1], 1.0, rtol=0.02)
    scales = np.ravel(q.params["layers"]["head"].weights.scale)
    usual = np.ravel(
        qjax.quantize(network, make_params(), images(), recipe)
        .params["layers"]["head"]
        .weights.scale
    )
    assert scales[1] > 1e-9 * usual[1]
    unraised = [0, 2, 3]
    assert np.all(
        (scales[unraised] > usual[unraised] / 2) & (scales[unraised] < usual[unraised] * 2)
    )


@pytest.mark.parametrize("factor", [1e-20, 1e20])
@pytest.mark.parametrize("recipe", [CHEAP, qjax.Recipe()], ids=["naive", "default"])
def test_kernels_of_unusual_magnitude(recipe: qjax.Recipe, factor: float):
    params = make_params()
    for leaf in params["hidden"].values():
        leaf *= factor
    params["head"]["w"] /= factor
    check(params, recipe, 30)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_a_column_of_unusual_magnitude(factor: float):
    params = make_params()
    params["hidden"]["w"][:, 3] *= factor
    params["hidden"]["b"][0, 3] *= factor
    params["head"]["w"][3] /= factor
    q = qjax.quantize(network, params, images(), CHEAP)
    kernel = q.params["layers"]["hidden"].kernel
    assert np.abs(kernel[0, :, 3]).max() == 127


def test_the_error_names_the_bias():
    q = qjax.quantize(network, make_params(), images(), CHEAP)
    layer = q.params["layers"]["hidden"]
    bias = layer.bias.at[5].set(2**31 - 2**7)
    layers = {**q.params["layers"], "hidden": dataclasses.replace(layer, bias=bias)}
    saturated = q._replace(params={**q.params, "layers": layers})
    with pytest.raises(ValueError, match="layer 'hidden' has a bias of 2,147,483,520 .* channel 5"):
        qjax.integer(saturated)


def test_a_layer_whose_sqnr_is_no_number_is_refused():
    q = qjax.quantize(network, make_params(), images(), CHEAP)
    [layer, _] = qjax.trace(network, make_params(), images())
    energies = (jnp.array([jnp.inf]), jnp.array([1.0]))
    fit = Fit(q.params["layers"]["hidden"], 30.0, energies, None, None, None)
    with pytest.raises(ValueError, match="layer 'hidden' cannot be quantized: the SQNR"):
        layer_report(layer, fit)


def test_values_beyond_float32_are_refused_by_name():
    params = make_params()
    params["hidden"]["w"] *= 1e37
    with pytest.raises(ValueError, match="layer 'hidden' cannot be quantized"):
        qjax.quantize(network, params, images() * 1e20, CHEAP)
