"""The range of an output before a smooth activation: what that flattens needs no codes."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.fit.ranges import output_values
from qjax.graph.activation import ACTIVATIONS, Activation
from qjax.objectives.errors import OUTPUT_MSE

Z: Any = 2 * np.random.default_rng(0).standard_t(5, size=(512, 8)).astype(np.float32)
PARAMS = {"w": jnp.eye(8)}
SEEN, UNSEEN = "output_mse", "mse"


@functools.cache
def output_range(activation: str, method: str, bits: int = 4) -> tuple[float, float]:
    """The range of a layer's output, which is the images themselves."""
    outputs = qjax.QuantSpec(bits, False, "per_tensor")
    recipe = qjax.Recipe(weights=None, inputs=None, outputs=outputs, range_method=method)
    act = ACTIVATIONS[activation].function
    q = qjax.quantize(lambda params, x: act(x @ params["w"]), PARAMS, Z, recipe)
    assert q.report[0].activation == activation
    return tuple(map(float, q.params["layers"]["w"].outputs.range))


def error(activation: str, ends: tuple[float, float], bits: int = 4) -> float:
    """E‖act(ẑ) − act(z)‖², by a loop that knows nothing of qjax.

    Args:
      activation: its name.
      ends: of the range, 0 among its codes.
      bits: of the codes.
    """
    scale = (ends[1] - ends[0]) / (2**bits - 1)
    z_hat = scale * np.clip(np.round(Z / scale), round(ends[0] / scale), round(ends[1] / scale))
    act = ACTIVATIONS[activation].function
    return float(jnp.mean(jnp.square(act(jnp.float32(z_hat)) - act(Z))))


@pytest.mark.parametrize("activation", ["gelu", "silu", "mish"])
def test_the_far_negative_side_gets_no_codes(activation: str):
    low, high = output_range(activation, SEEN)
    lowest, highest = output_range(activation, UNSEEN)
    assert 0.2 * lowest < low < 0, "the dip below 0 is shown, what is far below it is not"
    found, unseen = (error(activation, ends) for ends in ((low, high), (lowest, highest)))
    assert found < 0.6 * unseen
    lows, highs = np.linspace(-4, 0, 9), np.linspace(0.5, 1.0, 9) * Z.max()
    assert found < 1.15 * min(error(activation, ends) for ends in itertools.product(lows, highs))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_both_ends_of_a_saturating_function_are_cut(activation: str):
    low, high = output_range(activation, SEEN)
    assert 0.4 * Z.min() < low < 0 < high < 0.4 * Z.max()
    found, unseen = (error(activation, output_range(activation, m)) for m in (SEEN, UNSEEN))
    assert found < 0.5 * unseen


def test_a_slope_below_zero_needs_coarser_codes_than_none():
    ends = {name: output_range(name, SEEN) for name in ("leaky_relu", "none")}
    assert ends["none"][0] < ends["leaky_relu"][0] <= 0


def sampled(activation: Activation) -> tuple[int, ...]:
    values = jax.ShapeDtypeStruct((4, 256, 256, 8), jnp.float32)
    found = jax.eval_shape(
        lambda z: output_values(OUTPUT_MSE, activation, activation.bounds, None, z, z, None).target,
        values,
    )
    return found.shape


def test_a_known_function_is_searched_on_a_sample_and_another_one_on_a_whole_batch():
    other = Activation("other", ACTIVATIONS["none"].bounds, jnp.sin, is_pointwise=False)
    assert sampled(other) == (256, 256, 8)
    assert sampled(ACTIVATIONS["gelu"]) == sampled(ACTIVATIONS["relu"])
    assert np.prod(sampled(ACTIVATIONS["gelu"])) < 256 * 256 * 8
