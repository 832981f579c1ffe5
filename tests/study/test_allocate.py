"""Choosing widths: the dynamic program is exact, and budgets are kept."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax.study.allocate import Option, allocate, estimated_drop, least_error
from qjax.study.sensitivity import Sensitivity

choices = st.lists(
    st.builds(Option, st.integers(0, 20), st.integers(0, 1000).map(float)), min_size=1, max_size=4
)


@hypothesis.given(st.lists(choices, min_size=1, max_size=5), st.integers(0, 80))
def test_the_least_error_is_that_of_trying_everything(items: list[list[Option]], budget: int):
    options = [
        sum(choice.error for choice in combination)
        for combination in itertools.product(*items)
        if sum(choice.cost for choice in combination) <= budget
    ]
    if not options:
        with pytest.raises(ValueError, match="the least possible cost is"):
            least_error(items, budget)
        return
    chosen = [item[k] for item, k in zip(items, least_error(items, budget), strict=True)]
    assert sum(choice.cost for choice in chosen) <= budget
    assert sum(choice.error for choice in chosen) == min(options)


def sensitivity(layer: str, part: str, elements: int, weight: float) -> Sensitivity:
    errors = {bits: weight * 4.0**-bits for bits in (2, 3, 4, 5, 6, 8)}
    return Sensitivity(layer, part, elements, errors)  # type: ignore[arg-type]


SENSITIVITIES = (
    sensitivity("first", "weights", 100, 50.0),
    sensitivity("first", "activations", 400, 1.0),
    sensitivity("second", "weights", 900, 1.0),
    sensitivity("second", "activations", 100, 30.0),
)


def test_average_bits_holds_for_weights_and_activations_apart():
    allocation = allocate(SENSITIVITIES, qjax.recipe(8), average_bits=4.5)
    for part, sizes in {"weights": (100, 900), "activations": (400, 100)}.items():
        widths = [allocation.widths[layer, part] for layer in ("first", "second")]  # type: ignore[index]
        assert np.average(widths, weights=sizes) == allocation.average_bits[part] <= 4.5  # type: ignore[index]
    assert allocation.widths["first", "weights"] > allocation.widths["second", "weights"]
    assert allocation.widths["first", "activations"] < allocation.widths["second", "activations"]


def test_the_recipe_has_the_chosen_widths_and_keeps_its_own_overrides():
    wanted = qjax.recipe(8, inputs=None, overrides={"second": {"output_bits": 7}})
    allocation = allocate(SENSITIVITIES, wanted, average_bits=4.5)
    layers = allocation.recipe.by_layer(["first", "second"])
    assert layers["first"].weights is not None and layers["first"].outputs is not None
    assert layers["first"].weights.bits == allocation.widths["first", "weights"]
    assert layers["first"].outputs.bits == allocation.widths["first", "activations"]
    assert layers["first"].inputs is None
    assert layers["second"].outputs is not None and layers["second"].outputs.bits == 7
    assert qjax.Recipe.from_json(allocation.recipe.to_json()) == allocation.recipe


def test_max_kernel_bytes_leaves_activations_alone():
    allocation = allocate(SENSITIVITIES, qjax.recipe(7), max_kernel_bytes=500)
    widths = {layer: allocation.widths[layer, "weights"] for layer in ("first", "second")}
    assert -(-100 * widths["first"] // 8) + -(-900 * widths["second"] // 8) <= 500
    layers = allocation.recipe.by_layer(["first", "second"])
    assert all(layer.inputs is not None and layer.inputs.bits == 7 for layer in layers.values())


def test_widths_that_overrides_give_are_kept_and_counted():
    wanted = qjax.recipe(8, overrides={"first": {"weight_bits": 8}})
    allocation = allocate(SENSITIVITIES, wanted, average_bits=4.5)
    assert allocation.widths["first", "weights"] == 8
    assert allocation.widths["second", "weights"] == 4  # (100 * 8 + 900 * 4) / 1000
    assert allocation.average_bits["weights"] == 4.4
    assert allocation.recipe.by_layer(["first", "second"])["first"].weights == wanted.weights
    allocation = allocate(
        SENSITIVITIES,
        qjax.recipe(8, overrides={"first": {"weights": None}}),
        max_kernel_bytes=100 * 4 + 900 * 3 // 8 + 1,
    )
    assert allocation.widths["first", "weights"] == 32
    assert allocation.widths["second", "weights"] == 3


def test_the_table_names_every_layer_and_the_mean():
    lines = str(allocate(SENSITIVITIES, qjax.recipe(8), average_bits=4.5)).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "first", "second", "mean", "error"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one of `average_bits` and `max_kernel_bytes`"),
        ({"average_bits": 4.0, "max_kernel_bytes": 9}, "give one of"),
        ({"average_bits": 1.5}, "`average_bits` must be at least 2.00 for the weights .*; got 1.5"),
        (
            {"max_kernel_bytes": 9},
            "`max_kernel_bytes` must be at least 250 for the weights.*; got 9",
        ),
    ],
)
def test_bad_budgets_are_refused(budget: dict, message: str):
    with pytest.raises(ValueError, match=message):
        allocate(SENSITIVITIES, qjax.recipe(8), **budget)


def test_the_estimated_drop_is_exact_for_labels_drawn_from_the_float_network():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32)
    logits = np.array([[1.0, 3.0, 2.0], [0.0, 5.0, 1.0]], np.float32)
    np.testing.assert_allclose(estimated_drop(probabilities, logits), 100 * (0.7 - 0.2) / 2, 1e-5)
