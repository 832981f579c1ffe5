"""Sensitivities are the errors of networks in which all but one part of one layer is float."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.study.sensitivity import measure_sensitivities

RNG = np.random.default_rng(0)
PARAMS = {
    "first": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32),
    "second": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
}
IMAGES = RNG.normal(size=(300, 6)).astype(np.float32)
WIDTHS = (3, 6)


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]  # which no code passes through


@pytest.mark.parametrize("position", ["pre_activation", "both"])
def test_a_sensitivity_is_the_error_of_the_network_with_one_part_quantized(position: str):
    recipe = qjax.recipe(8, output_position=position)
    found = measure_sensitivities(network, PARAMS, IMAGES, recipe, WIDTHS)
    assert [(item.layer, item.part) for item in found] == [
        (layer, part) for layer in ("first", "second") for part in ("weights", "activations")
    ]
    assert [item.elements for item in found] == [48, 8, 24, 3]
    reference = network(PARAMS, IMAGES)
    # Of both grids of the first output, the second layer's input shares one; alone, it has its own.
    for item in found if position == "pre_activation" else found[:3]:
        for width in WIDTHS:
            recipe = qjax.recipe(
                width,
                rounding="nearest",
                reconstructions=0,
                sweeps=0,
                sequential=False,
                output_position=position,
            )
            kept = (
                {"inputs": None, "outputs": None} if item.part == "weights" else {"weights": None}
            )
            other = "second" if item.layer == "first" else "first"
            nothing = {"weights": None, "inputs": None, "outputs": None}
            alone = dataclasses.replace(recipe, **kept, overrides={other: nothing})
            q = qjax.quantize(network, PARAMS, IMAGES, alone)
            error = jnp.sum((q.apply_fn(q.params, IMAGES) - reference) ** 2)
            expected = float(error / jnp.sum(reference**2))
            np.testing.assert_allclose(item.errors[width], expected, rtol=1e-3)


def test_more_bits_are_less_sensitive():
    for item in measure_sensitivities(network, PARAMS, IMAGES, qjax.recipe(8), (3, 8)):
        assert 0 < item.errors[8] < item.errors[3] / 10


def test_only_what_the_recipe_quantizes_is_measured():
    found = measure_sensitivities(network, PARAMS, IMAGES, qjax.recipe(inputs=None, outputs=None))
    assert {item.part for item in found} == {"weights"}
    nothing = qjax.recipe(weights=None, inputs=None, outputs=None)
    with pytest.raises(ValueError, match="quantizes neither weights nor activations"):
        measure_sensitivities(network, PARAMS, IMAGES, nothing)


def test_ranges_at_run_time_are_measured_too():
    formats = {"activation_ranges": "dynamic", "activation_granularity": "per_example"}
    recipe = qjax.recipe(8, **formats)
    found = measure_sensitivities(network, PARAMS, IMAGES, recipe, WIDTHS)
    reference = network(PARAMS, IMAGES)
    for item in found:
        if item.part == "weights":
            continue
        other = "second" if item.layer == "first" else "first"
        for width in WIDTHS:
            own = qjax.recipe(width, **formats, overrides={other: {"inputs": None}}).naive()
            alone = dataclasses.replace(own, weights=None)
            q = qjax.quantize(network, PARAMS, IMAGES, alone)
            error = jnp.sum((q.apply_fn(q.params, IMAGES) - reference) ** 2)
            # A bias is corrected for the mean error, which is small here.
            expected = float(error / jnp.sum(reference**2))
            np.testing.assert_allclose(item.errors[width], expected, rtol=5e-2)
