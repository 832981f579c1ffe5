"""Convolutions of int8 are tried on the device before a network relies on them."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.integer import lowerings, trial


def grouped(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        params["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )


@pytest.fixture(autouse=True)
def forget() -> Any:
    trial.are_exact.cache_clear()
    yield
    trial.are_exact.cache_clear()


TABLE = lowerings.fastest_on("gpu")  # no platform that was measured


@pytest.mark.parametrize("are_grouped", [False, True])
def test_this_device_convolves_exactly(are_grouped: bool):
    assert trial.are_exact(are_grouped)


def test_a_device_that_does_not_gets_products_of_matrices(monkeypatch: Any, caplog: Any):
    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(3, 3, 4, 8)))}
    x = jnp.float32(rng.normal(size=(4, 5, 5, 8)))
    q = qjax.quantize(grouped, params, x, qjax.Recipe().naive())
    layer = q.params["layers"]["w"]
    [described] = qjax.trace(grouped, params, x)
    operation = described.operation
    sound = lowerings.choose(operation, layer, None, TABLE)
    assert sound.method is lowerings.INT8
    right = trial._convolved

    def wrong(x: Any, kernel: Any, groups: int, dtype: Any) -> jax.Array:
        return right(x, kernel, groups, dtype) + jnp.asarray(dtype == jnp.int32, dtype)

    monkeypatch.setattr(trial, "_convolved", wrong)
    trial.are_exact.cache_clear()
    with caplog.at_level(logging.WARNING, "qjax"):
        chosen = [lowerings.choose(operation, layer, None, TABLE) for _ in range(2)]
    assert [each.method for each in chosen] == [lowerings.DOT] * 2
    [message] = caplog.messages
    assert "convolutions of int8 in groups give wrong sums on this device" in message
    assert lowerings.choose(operation, layer, lowerings.INT8, TABLE).method is lowerings.INT8
    folded = lowerings.folded_bias(layer, lowerings.INT8)
    grid = lowerings.signed(layer.grid)
    codes = jnp.asarray(rng.integers(-128, 128, x.shape), jnp.int8)
    sums = [
        lowerings.accumulate(
            *(operation, lowerings.operands(operation, layer, folded, each), codes),
            *(grid.zero_point, each),
        )
        for each in (sound, chosen[0])
    ]
    np.testing.assert_array_equal(*sums)


def test_a_trace_from_outside_has_no_products_of_two_types(monkeypatch: pytest.MonkeyPatch):
    """Other compilers may take unsigned operands for signed ones: `uint8` has to be asked for."""
    monkeypatch.setattr(lowerings, "dot_extension", lambda: "VNNI")
    q, x = small.quantized(), small.images(5)
    found = {
        name: str(jax.make_jaxpr(qjax.integer(q, lowering=given))(q.params, x))
        for name, given in {"default": None, "asked": "uint8"}.items()
    }
    assert ":u8[" in found["asked"] and ":u8[" not in found["default"]
    chosen = qjax.integer(q).lowerings(x).values()
    assert lowerings.UINT8 in [lowering.method for lowering in chosen]


@pytest.mark.parametrize("extension", [None, "VNNI", "AMX"])
def test_channels_first_are_lowered_as_channels_last(
    monkeypatch: pytest.MonkeyPatch, extension: str | None
):
    """XLA's products and convolutions of int8 take ten times as long with other layouts."""
    monkeypatch.setattr(lowerings, "dot_extension", lambda: extension)
    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(32, 32, 3, 3)))}
    x = jnp.float32(rng.normal(size=(4, 32, 6, 6)))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv(x, params["w"], (1, 1), "SAME")

    run = qjax.integer(q := qjax.quantize(apply_fn, params, x, qjax.Recipe().naive()))
    assert run.lowerings(x)["w"].method is (lowerings.PAIRS if extension else lowerings.INT8)
    text = jax.jit(run).lower(q.params, x).as_text()
    assert "x[0, 1, i, o]->[b, 0, 1, f]" in text and "[b, f, 0, 1]" not in text
    np.testing.assert_array_equal(run(q.params, x), q.apply_fn(q.params, x))
