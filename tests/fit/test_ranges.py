"""The range of an output under its activation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.fit.ranges import choose_output, output_values
from qjax.fit.search import Candidates
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import NONE, RELU, RELU6, Activation
from qjax.objectives.table import OBJECTIVES
from qjax.recipe import ACTIVATIONS


def chosen(method: str, activation: Activation, spec: QuantSpec = ACTIVATIONS):
    values = jnp.float32(np.random.default_rng(0).normal(0.0, 4.0, (1, 64, 16)))
    objective = OBJECTIVES[method]
    found = output_values(objective, activation, activation.bounds, None, values, values, None)
    static = {"spec": spec, "activation": activation, "candidates": Candidates(8, 0)}
    return choose_output(found, spec.limits, objective=objective, **static)[0]


@pytest.mark.parametrize("method", OBJECTIVES)
def test_under_a_relu_the_range_is_the_half_line(method: str):
    under_relu = chosen(method, RELU)
    assert int(under_relu.zero_point) == int(under_relu.qmin) == 0
    assert float(under_relu.range[1]) > 6.0
    assert float(chosen(method, RELU6).range[1]) <= 6.001


def test_without_one_it_is_not():
    assert 100 < int(chosen("absmax", NONE).zero_point) < 156


@pytest.mark.parametrize("method", OBJECTIVES)
def test_what_is_added_to_something_keeps_both_ends(method: str):
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x @ params["a"])
        return jax.nn.relu(x + x @ params["b"]) @ params["c"]

    draw = np.random.default_rng(0).normal
    params = {name: jnp.float32(draw(size=(6, 6))) for name in "abc"}
    recipe = dataclasses.replace(qjax.recipe(8, grid_size=8).naive(), range_method=method)
    q = qjax.quantize(apply_fn, params, jnp.float32(draw(size=(256, 6))), recipe)
    layers = q.params["layers"]
    assert int(layers["a"].outputs.zero_point) == 0
    assert int(layers["b"].outputs.zero_point) > 50, "the sum needs what is below 0"
