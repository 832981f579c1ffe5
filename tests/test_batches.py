"""How calibration images are cut into batches and spread over devices, and what is logged of it."""

import logging
from typing import Any

import jax
import numpy as np
import pytest
import small

import qjax
from qjax import placing
from qjax.fit.estimate import stream_bytes
from qjax.graph.layers import find_layers

RECIPE = qjax.recipe(4, range_method="absmax", reconstructions=0, sweeps=0)  # GPTQ, on moments


def codes(q: qjax.Quantized) -> dict[str, np.ndarray]:
    return {name: np.asarray(layer.kernel) for name, layer in q.params["layers"].items()}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "BATCH_SIZE", 8)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "BATCH_SIZE", 8)
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
    assert placing.cut_of(total) == (count, size)
    placing.warn_of_images_left_out(placing.cut_of(total), total)
    said = f"{count * size} of {total} calibration images are used"
    assert [said in message for message in caplog.messages] == [True] * (count * size < total)


def test_wide_batches_are_cut_again(monkeypatch: pytest.MonkeyPatch):
    """Of images so large that fitting on a batch would take more than its share of memory."""
    params, x = small.make_params(), small.images(16)
    sizes = []

    def traced(params: Any, x: jax.Array) -> jax.Array:
        sizes.append(len(x))
        return small.apply_fn(params, x)

    qjax.quantize(traced, params, x, small.CHEAP)
    assert set(sizes) <= {8, 9}
    network = find_layers(traced, params, x[:8])
    of_8 = stream_bytes(network, small.CHEAP, 1).stacked
    monkeypatch.setattr(placing, "BATCH_BYTES", of_8 // 2)
    assert placing.narrowed(placing.cut_of(16), 16, network, small.CHEAP) == (4, 4)
    sizes.clear()
    q = qjax.quantize(traced, params, x, small.CHEAP)
    assert 4 in sizes and q.apply_fn(q.params, x).shape[0] == 16


def test_raised_scales_are_logged(caplog: pytest.LogCaptureFixture):
    params = small.make_params()
    kernel, bias = params["conv"]["w"], params["conv"]["b"]
    params["conv"] = {"w": kernel.at[..., 1].multiply(1e-9), "b": bias.at[..., 1].set(0.5)}
    qjax.quantize(small.apply_fn, params, small.images(8), small.CHEAP)
    [record] = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "qjax.quantize")
    assert "layer 'conv': the scales of 1 channels of weights are raised" in record.message


def test_four_devices_hold_a_fourth_of_the_activations_each(mesh: jax.sharding.Mesh):
    """Of one device's, while layers are fitted: what is laid out by examples is spread by them."""
    held: dict[int, int] = {}
    for count in (1, 4):
        some, found = jax.sharding.Mesh(mesh.devices[:count], "data"), []

        def look(*_: Any, found: list[int] = found) -> None:
            arrays = [a for a in jax.live_arrays() if a.shape[1:2] == (8,) and a.ndim == 5]
            shapes = [a.sharding.shard_shape(a.shape) for a in arrays]
            found.append(sum(map(np.prod, shapes)))

        x = small.images(24)
        qjax.quantize(small.apply_fn, small.make_params(), x, RECIPE, mesh=some, progress=look)
        held[count] = max(found)
    assert 0 < held[4] <= 0.3 * held[1]
