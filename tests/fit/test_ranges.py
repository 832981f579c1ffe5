"""The range of an output under its activation."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.fit.ranges import choose_output, output_values
from qjax.fit.search import Candidates
from qjax.formats.spec import QuantSpec
from qjax.graph.activation import NONE, RELU, RELU6, Activation
from qjax.objectives.table import OBJECTIVES
from qjax.recipe import ACTIVATIONS


def chosen(method: str, activation: Activation, spec: QuantSpec = ACTIVATIONS):
    values = jnp.float32(np.random.default_rng(0).normal(0.0, 4.0, (1, 64, 16)))
    objective = OBJECTIVES[method]
    found = output_values(objective, activation, None, values, values, None)
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
