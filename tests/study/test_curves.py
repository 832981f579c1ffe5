"""Cost functions over candidate ranges: the curves agree with the search and with each other."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import small

from qjax import QuantSpec
from qjax.graph.layers import find_layers, shapes_of
from qjax.objectives.table import OBJECTIVES
from qjax.recipe import LayerRecipe
from qjax.run.tap import float_layers
from qjax.study.curves import SHARES, Curves, layer_curves


@functools.cache
def curves(bits: int = 4) -> dict[str, Curves]:
    x = jnp.asarray(small.images())
    params = small.make_params()
    network = find_layers(small.apply_fn, params, shapes_of(x))
    folded = float_layers(network, params)["layers"]["conv"]
    activations = QuantSpec(bits, False, "per_tensor")
    recipe = LayerRecipe(QuantSpec(bits, granularity="per_tensor"), activations, activations)
    return {c.tensor: c for c in layer_curves(network.sites[0], folded, x, recipe)}


@pytest.mark.parametrize("tensor", ["weights", "input", "output"])
def test_curves_and_choices_agree(tensor: str):
    found = curves()[tensor]
    choices = {choice.method: choice for choice in found.choices}
    assert tuple(choices) == tuple(OBJECTIVES) and len(found.shares) == len(SHARES)
    assert choices["absmax"].share == 1.0
    full = 10 ** (-choices["absmax"].tensor_sqnr_db / 10)
    assert found.losses["mse"][-1] == pytest.approx(full, rel=1e-3)
    for values in found.losses.values():
        assert len(values) == len(SHARES) and min(values) >= -1e-6
    best = max(choices.values(), key=lambda choice: choice.output_sqnr_db)
    assert found.best == best
    for method in ("mse", "output_mse"):
        attribute = "tensor_sqnr_db" if method == "mse" else "output_sqnr_db"
        least = -10 * np.log10(min(found.losses[method]))
        # The search of a two-sided range moves its ends apart, and can only do better.
        assert getattr(choices[method], attribute) >= least - 0.3


def test_one_range_for_all_weights_is_the_minimum_of_its_curve():
    found = curves()["weights"]
    for choice in found.choices:
        if choice.method in found.losses:
            least = found.shares[int(np.argmin(found.losses[choice.method]))]
            assert choice.share == pytest.approx(least, abs=1e-5)


def test_no_method_spends_codes_on_what_the_relu_discards():
    choices = {choice.method: choice for choice in curves(8)["output"].choices}
    assert choices["mse"].output_sqnr_db == pytest.approx(choices["output_mse"].output_sqnr_db)
    for choice in choices.values():
        assert choice.tensor_sqnr_db == pytest.approx(choice.output_sqnr_db)


def test_every_channel_is_looked_at():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2**14, 4)), jnp.float32)
    found = []
    for loud in (0, 15):
        params = {"w": jnp.ones((4, 16)).at[:, loud].set(100.0)}
        network = find_layers(lambda params, x: x @ params["w"], params, shapes_of(x))
        folded = float_layers(network, params)["layers"]["w"]
        recipe = LayerRecipe(None, None, QuantSpec(4, False, "per_tensor"))
        (output,) = layer_curves(network.sites[0], folded, x, recipe)
        found.append([choice.tensor_sqnr_db for choice in output.choices])
    np.testing.assert_allclose(*found, atol=0.5)


def test_what_stays_in_float_has_no_curves():
    x = jnp.asarray(small.images())
    network = find_layers(small.apply_fn, small.make_params(), shapes_of(x))
    folded = float_layers(network, small.make_params())["layers"]["conv"]
    recipe = LayerRecipe(None, None, None)
    assert layer_curves(network.sites[0], folded, x, recipe) == ()
