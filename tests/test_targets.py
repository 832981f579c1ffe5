"""Targets: the formats that a runtime takes, and what it cannot run on integers."""

from typing import Any

import pytest

import qjax
from qjax.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_for_a_target_has_its_codes(name: str):
    recipe = qjax.recipe(8, target=name)
    assert recipe.weights is not None and recipe.weights.symmetric
    for spec in (recipe.inputs, recipe.outputs):
        assert spec is not None and spec.symmetric is (name == "tensorrt")


def test_without_a_target_nothing_is_refused():
    assert qjax.recipe(12) == qjax.recipe(12, target=None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight_bits": 9}, "`weights` must have at most 8 bits for TensorRT; got 9"),
        ({"input_bits": 16}, "`inputs` must have at most 8 bits for TensorRT; got 16"),
        ({"overrides": {"fc": {"output_bits": 12}}}, "`outputs` must have at most 8 bits"),
        ({"weight_bits": 1}, "`weights` must be symmetric uniform codes of at least 2 bits"),
        ({"weight_bits": 4, "weight_format": "apot"}, "`weights` must be symmetric uniform.* apot"),
        ({"weight_bits": 4, "weight_format": "kmeans"}, "`weights` must be .* the format kmeans"),
        ({"activation_ranges": "dynamic"}, "`inputs` must have static ranges for TensorRT"),
        ({"activation_granularity": "per_channel"}, "`inputs` must have granularity per_tensor"),
        (
            {"outputs": qjax.QuantSpec(symmetric=False, granularity="per_tensor")},
            r"`outputs` must be symmetric for TensorRT.*target='tensorrt'",
        ),
    ],
)
def test_what_a_target_cannot_run_is_refused(fields: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        qjax.recipe(8, target="tensorrt", **fields)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="`target` must be one of onnxruntime, .*; got 'tvm'"):
        qjax.recipe(8, target="tvm")
