"""The ONNX model in OpenVINO: layers on int8, and what fake quantization computes.

Weights have 7 bits: without VNNI instructions its sums of two products saturate at 8.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

import qjax

pytestmark = pytest.mark.runtimes

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"


@pytest.fixture(autouse=True)
def without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `import openvino` from sending what it counts, in a forked process, from a test."""
    monkeypatch.setenv("CI", "true")


def test_layers_are_int8_and_the_numbers_those_of_qjax():
    import openvino

    x = small.images(64)
    q = small.quantized(weight_bits=7, sums="quantized")
    model = qjax.to_onnx(q, x, target="openvino")
    core = openvino.Core()
    network = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    expected, step = q.apply_fn(q.params, x), float(q.params["layers"]["head"].outputs.scale)
    np.testing.assert_allclose(network(x)[0], expected, atol=1.01 * step)
    infos = [node.get_rt_info() for node in network.get_runtime_model().get_ops()]
    kinds = [(i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in infos]
    found = {kind: precision for kind, precision in kinds if kind.startswith(("Conv", "Fully"))}
    layers = {kind: found[kind] for kind in ("Convolution", "FullyConnected")}
    assert set(layers.values()) <= {"i8", "u8"}


def test_the_example_of_the_page_runs(tmp_path: Path):
    [code] = re.findall(r"```python\n(import openvino.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    q, images = small.quantized(weight_bits=7), small.images(5)
    path = str(tmp_path / "model.onnx")
    names: dict[str, Any] = {"np": np, "qjax": qjax, "q": q, "images": images, "path": path}
    exec(code, names)
    step = float(q.params["layers"]["head"].outputs.scale)
    np.testing.assert_allclose(names["logits"], q.apply_fn(q.params, images), atol=1.01 * step)
