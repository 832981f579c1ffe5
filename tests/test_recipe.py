"""Recipes: overrides by layer name, JSON, and what a user gets told."""

import json
from typing import Any

import pytest

import qjax
from qjax import QuantSpec, Recipe

NAMES = ("stem", "layer1/conv1", "layer1/conv2", "layer2/conv1", "head")


@pytest.mark.parametrize("bits", [17, 0, -8, 8.0, "8", True])
def test_width_out_of_range_is_refused(bits: Any):
    with pytest.raises(ValueError, match="must be an integer from 1 to 16"):
        qjax.recipe(bits)
    with pytest.raises(ValueError, match=f"`input_bits` must .*; got {bits!r}"):
        qjax.recipe(8, input_bits=bits)
    with pytest.raises(ValueError, match=f"`first_last_bits` must .*; got {bits!r}"):
        qjax.recipe(8, first_last_bits=bits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"range_method": "entropy"}, "`range_method` must be one of absmax, percentile, mse"),
        ({"rounding": "up"}, "`rounding` must be one of nearest"),
        ({"output_position": "after"}, "`output_position` must be one of pre_activation, post_"),
        ({"grid_size": 1}, "`grid_size` must be at least 2 candidates; got 1"),
        ({"grid_size": 10**6}, "`grid_size` must be at most 10000 candidates; got 1000000"),
        ({"sweeps": 10**9}, "`sweeps` must be at most 10000; got 1000000000"),
        (
            {"inputs": QuantSpec(granularity="per_group")},
            "`inputs` must have granularity per_tensor or per_channel; got per_group",
        ),
        (
            {"outputs": QuantSpec(), "range_method": "kl"},
            "`outputs` per channel needs the range_method absmax, mse or output_mse; got kl",
        ),
        (
            {"outputs": QuantSpec(scale="power_of_two")},
            "`outputs` with power_of_two scales must have granularity per_tensor; got per_channel",
        ),
        (
            {"weights": QuantSpec(granularity="per_tensor", ranges="dynamic")},
            "`weights` must have static ranges, which are known; got dynamic",
        ),
        ({"overrides": {"a": {"bit": 4}}}, "`overrides` must be one of bits, .*; got 'bit'"),
        ({"overrides": {"a": {"bits": 0}}}, "`bits` must be an integer from 1 to 16; got 0"),
        ({"overrides": {"a": {"weight_bits": 0}}}, "must be an integer from 1 to 16; got 0"),
        ({"overrides": {"a": {"rounding": "up"}}}, "`rounding` must be one of"),
        ({"overrides": {"a": {"grid_size": 3}}}, "`overrides` must be one of .*; got 'grid_size'"),
    ],
)
def test_recipe_refuses(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_recipe_from_widths():
    recipe = qjax.recipe(6, weight_bits=3, output_bits=10, inputs=None, rounding="nearest")
    assert recipe.weights == QuantSpec(3)
    assert recipe.inputs is None
    assert recipe.outputs == QuantSpec(10, symmetric=False, granularity="per_tensor")
    assert qjax.recipe() == Recipe()


def test_recipe_is_hashable_by_value():
    overrides = {"head": {"bits": 4}}
    assert hash(Recipe(overrides=overrides)) == hash(Recipe(overrides=overrides))
    assert Recipe(overrides=overrides) == Recipe(overrides=[("head", {"bits": 4})])
    assert Recipe(overrides=overrides) != Recipe()


def widths(recipe: Recipe) -> dict[str, tuple[int | None, ...]]:
    by_layer = recipe.by_layer(NAMES)
    assert tuple(by_layer) == NAMES
    return {
        name: tuple(spec and spec.bits for spec in (r.weights, r.inputs, r.outputs))
        for name, r in by_layer.items()
    }


def test_overrides_match_by_glob_and_later_ones_win():
    found = widths(
        qjax.recipe(
            4,
            overrides={"layer1/*": {"bits": 6}, "*conv1": {"weight_bits": 2}, "head": {"bits": 8}},
        )
    )
    assert found == {
        "stem": (4, 4, 4),
        "layer1/conv1": (2, 6, 6),
        "layer1/conv2": (6, 6, 6),
        "layer2/conv1": (2, 4, 4),
        "head": (8, 8, 8),
    }
    found = widths(qjax.recipe(4, overrides={"head": {"bits": 8}, "*": {"bits": 5}}))
    assert set(found.values()) == {(5, 5, 5)}


def test_first_and_last():
    found = widths(qjax.recipe(4, first_last_bits=8, overrides={"head": {"input_bits": 16}}))
    assert found["stem"] == (8, 8, 8)
    assert found["head"] == (8, 16, 8)
    assert {found[name] for name in NAMES[1:-1]} == {(4, 4, 4)}
    assert qjax.recipe(4, first_last_bits=8).by_layer(["only"])["only"].weights == QuantSpec(8)


def test_overrides_reach_and_leave_float():
    recipe = qjax.recipe(
        4,
        inputs=None,
        overrides={
            "stem": {"weights": None},
            "layer1/conv1": {"weight_bits": None, "input_bits": 8},
            "head": {"bits": 8},
        },
    )
    found = widths(recipe)
    assert found["stem"] == (None, None, 4)
    assert found["layer1/conv1"] == (None, 8, 4)
    assert found["head"] == (8, None, 8), "`bits` leaves in float what is in float"


def test_overrides_take_every_layer_field():
    changes = {"range_method": "absmax", "bias_correction": False, "output_position": "both"}
    changes["weights"] = QuantSpec(4, granularity="per_group", group_size=8)
    by_layer = Recipe(overrides={"head": changes}).by_layer(NAMES)
    assert {key: getattr(by_layer["head"], key) for key in changes} == changes
    assert by_layer["stem"] == Recipe().by_layer(NAMES)["stem"]


def test_a_pattern_that_matches_nothing_is_refused():
    recipe = qjax.recipe(overrides={"Head": {"bits": 4}})
    with pytest.raises(ValueError, match=r"pattern 'Head' matches no layer; .* stem, layer1/conv1"):
        recipe.by_layer(NAMES)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(weights=None, inputs=None, outputs=None),
        qjax.recipe(4, first_last_bits=8, range_method="mse", grid_size=7, sequential=False),
        Recipe(
            overrides={
                "a": {"weights": QuantSpec(3, granularity="per_group")},
                "b": {"inputs": None},
            }
        ),
    ],
)
def test_json_round_trip(recipe: Recipe):
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_fixed_point_is_of_every_tensor():
    recipe = qjax.recipe(
        8, fixed_point=True, first_last_bits=6, overrides={"layer1/*": {"bits": 4}}
    )
    for layer in recipe.by_layer(NAMES).values():
        assert layer.weights and layer.inputs and layer.outputs
        assert {s.scale for s in (layer.weights, layer.inputs, layer.outputs)} == {"power_of_two"}
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe != qjax.recipe(8, first_last_bits=6, overrides={"layer1/*": {"bits": 4}})
    with pytest.raises(ValueError, match="`inputs` with power_of_two scales must have granularity"):
        qjax.recipe(8, fixed_point=True, activation_granularity="per_channel")


def test_ranges_at_run_time_leave_outputs_in_float_unless_they_have_a_width():
    recipe = qjax.recipe(8, activation_ranges="dynamic", activation_granularity="per_example")
    assert recipe.inputs == QuantSpec(8, False, "per_example", ranges="dynamic")
    assert recipe.outputs is None and recipe.weights == QuantSpec()
    both = qjax.recipe(8, activation_ranges="dynamic", output_bits=6)
    assert both.outputs == QuantSpec(6, False, "per_tensor", ranges="dynamic")
    assert Recipe.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert "ranges" not in json.dumps(Recipe().to_json())
