"""How calibration images are cut into batches and spread over devices, and what is logged of it."""

import importlib
import logging
from typing import Any

import jax
import numpy as np
import pytest
import small

import qjax

quantize_module: Any = importlib.import_module("qjax.quantize")  # `qjax.quantize` is the function


RECIPE = qjax.recipe(4, range_method="absmax", reconstructions=0, sweeps=0)  # GPTQ, on moments


def codes(q: qjax.Quantized) -> dict[str, np.ndarray]:
    return {name: np.asarray(layer.kernel) for name, layer in q.params["layers"].items()}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "BATCH_SIZE", 8)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_module, "BATCH_SIZE", 8)
        return codes(qjax.quantize(small.apply_fn, small.make_params(), small.images(24), RECIPE))


@pytest.mark.parametrize("devices", [3, 4])
def test_codes_do_not_depend_on_devices(
    mesh: jax.sharding.Mesh, expected: Any, devices: int, caplog: pytest.LogCaptureFixture
):
    some = jax.sharding.Mesh(mesh.devices[:devices], "data")
    q = qjax.quantize(small.apply_fn, small.make_params(), small.images(24), RECIPE, mesh=some)
    jax.tree.map(np.testing.assert_array_equal, codes(q), expected)
    said = "2 of 3 devices are used: batches of 8 images do not divide among more."
    assert [text for text in caplog.messages if "devices" in text] == [said] * (devices == 3)


@pytest.mark.parametrize(
    ("total", "count", "size"), [(8, 1, 8), (13, 2, 6), (15, 3, 5), (17, 4, 4), (24, 3, 8)]
)
def test_no_image_counts_twice(total: int, count: int, size: int, caplog: Any):
    images = np.arange(total)
    stacked = quantize_module._stack({"x": images})["x"]
    np.testing.assert_array_equal(stacked, images[: count * size].reshape(count, size))
    said = f"{count * size} of {total} calibration images are used"
    assert [said in message for message in caplog.messages] == [True] * (count * size < total)


def test_raised_scales_are_logged(caplog: pytest.LogCaptureFixture):
    params = small.make_params()
    kernel, bias = params["conv"]["w"], params["conv"]["b"]
    params["conv"] = {"w": kernel.at[..., 1].multiply(1e-9), "b": bias.at[..., 1].set(0.5)}
    qjax.quantize(small.apply_fn, params, small.images(8), small.CHEAP)
    [record] = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "qjax.quantize")
    assert "layer 'conv': the scales of 1 channels of weights are raised" in record.message
