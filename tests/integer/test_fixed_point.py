"""Networks in fixed point: shifts alone give what fake quantization gives, bit for bit."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.extend import core

import qjax
from qjax import QParams, QuantSpec
from qjax.graph.jaxpr import subjaxprs
from qjax.integer.codes import WIDE, GridKey, for_sum, on_grid
from qjax.integer.requantize import SHIFT

CASES = {case.id: case for case in models.CASES}
PER_TENSOR = QuantSpec(6, granularity="per_tensor", scale="power_of_two")
# The default recipe too: refits, GPTQ and sweeps must keep scales powers of two.
RECIPES = {
    "naive": qjax.recipe(8, fixed_point=True).naive(),
    "whole": qjax.recipe(4, fixed_point=True, grid_size=4),
    "per_tensor": qjax.recipe(6, fixed_point=True, weights=PER_TENSOR).naive(),
    "float_outputs": qjax.recipe(8, fixed_point=True, outputs=None).naive(),
}


@functools.cache
def quantized(id: str, recipe: str) -> qjax.Quantized:
    case = CASES[id]
    return qjax.quantize(case.apply_fn, case.params, case.x, RECIPES[recipe])


def same(q: qjax.Quantized, x: Any) -> None:
    """Codes of every layer and logits of shifts are those of fake quantization."""
    run = qjax.integer(q, arithmetic="shift")
    expected, found = q.apply_fn.codes(q.params, x), run.codes(q.params, x)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    np.testing.assert_array_equal(run(q.params, x), q.apply_fn(q.params, x))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_residual_network_runs_with_shifts_alone(recipe: str):
    q = quantized("linen_resnet", recipe)
    for layer in q.params["layers"].values():
        for format in filter(None, (layer.weights, layer.inputs, layer.outputs)):
            assert np.all(np.frexp(np.asarray(format.scale))[0] == 0.5)
            offset = (int(format.qmax) + 1) // 2
            assert np.all(np.isin(format.zero_point, (0, offset)))
    x = jnp.concatenate([CASES["linen_resnet"].x * factor for factor in (1.0, 0.3, 3.0)])
    same(q, x)


@pytest.mark.parametrize("id", ["linen_mobilenet", "plain_nchw", "linen_cnn"])
def test_other_networks_do(id: str):
    same(quantized(id, "naive"), CASES[id].x)


def test_a_sum_of_many_terms_loses_no_bit():
    """As of the residual stream of a deep network: what it may reach grows with every term."""
    rng = np.random.default_rng(0)
    total, exact = None, np.zeros(50)
    for exponent in rng.integers(-6, 0, 60):
        codes = rng.integers(-128, 127, 50, endpoint=True)
        exact = exact + codes * 2.0**exponent
        key = GridKey((2.0**exponent,), (0,), -128, 127)
        qparams = QParams(jnp.float32(2.0**exponent), jnp.int32(0), -128, 127)
        term = on_grid(jnp.int8(codes), qparams, key)
        if total is None:
            total = term
        else:
            first, second = for_sum([total, term], SHIFT)
            total = first.replace(first.codes + second.codes)
        np.testing.assert_array_equal(total.real, exact)
        assert np.abs(np.asarray(total.centered, np.int64)).max() <= WIDE


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The equations that contain no others."""
    for equation in jaxpr.eqns:
        inner = list(subjaxprs(equation))
        for body in inner:
            yield from equations(body)
        if not inner:
            yield equation


def test_after_the_input_is_rounded_no_real_number_is_touched():
    q, x = quantized("linen_resnet", "naive"), CASES["linen_resnet"].x
    run = qjax.integer(q, arithmetic="shift")
    traced = jax.make_jaxpr(lambda x: run.codes(q.params, x))(x)
    touched = {
        variable.aval.shape
        for equation in equations(traced.jaxpr)
        for variable in equation.outvars
        if jnp.issubdtype(variable.aval.dtype, jnp.floating) and variable.aval.size > 64
    }
    assert touched == {x.shape}


def test_a_mean_that_no_shift_divides_is_taken_in_float():
    """Of 9 positions: 1/9 would be 1/8."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((x @ params[0]).reshape(-1, 9, 5), 1) @ params[1]

    rng = np.random.default_rng(0)
    params = [jnp.float32(rng.normal(size=size)) for size in ((4, 5), (5, 3))]
    x = jnp.float32(rng.normal(size=(36, 4)))
    same(qjax.quantize(apply_fn, params, x, qjax.recipe(8, fixed_point=True).naive()), x)


def test_free_scales_are_not_exact_in_shifts():
    case = CASES["linen_resnet"]
    q = qjax.quantize(case.apply_fn, case.params, case.x, qjax.recipe(8).naive())
    with pytest.raises(AssertionError):
        same(q, case.x)
