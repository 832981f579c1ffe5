"""The .tflite model in LiteRT: int8 from end to end, and what fake quantization computes."""

import collections
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

import qjax

pytestmark = pytest.mark.runtimes

PAGE = Path(__file__).parents[2] / "docs" / "stablehlo.md"
RECIPE = dataclasses.replace(small.CHEAP, sums="quantized")


def conv(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options
    )


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(x, params["stem"]))
    x = jax.nn.relu(x + conv(x, params["depthwise"], feature_group_count=4))
    return x.mean((1, 2)) @ params["head"] + params["bias"]


def make_params() -> Any:
    shapes = {"stem": (3, 3, 2, 4), "depthwise": (3, 3, 1, 4), "head": (4, 3), "bias": (1, 3)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


def test_layers_and_sums_are_int8_and_the_numbers_those_of_qjax():
    from ai_edge_litert.interpreter import Interpreter

    x = small.images(64)
    q = qjax.quantize(apply_fn, make_params(), x, RECIPE)
    interpreter = Interpreter(model_content=qjax.to_tflite(q, x))
    run = interpreter.get_signature_runner("serving_default")
    found, expected = run(input_0=x)["output_0"], q.apply_fn(q.params, x)
    step = float(q.params["layers"]["head"].outputs.scale)
    np.testing.assert_allclose(found, expected, atol=1.01 * step)
    assert np.mean(found == expected) > 0.98
    types = collections.Counter(
        tensor["dtype"].__name__ for tensor in interpreter.get_tensor_details()
    )
    assert types["float32"] == 2, "the input and the output alone"
    assert types["int8"] >= 3 + 5, "kernels, and what layers, sum and pool read and write"


def test_the_example_of_the_page_runs(tmp_path: Path):
    [code] = re.findall(r"```python\n(from pathlib.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    q, images = small.quantized(), small.images(5)
    path = str(tmp_path / "model.tflite")
    names: dict[str, Any] = {"np": np, "qjax": qjax, "q": q, "images": images, "path": path}
    exec(code, names)
    step = float(q.params["layers"]["head"].outputs.scale)
    np.testing.assert_allclose(names["logits"], q.apply_fn(q.params, images), atol=1.01 * step)


def test_a_process_without_jax_runs_it(tmp_path: Path):
    q, x = small.quantized(), small.images(5)
    (tmp_path / "model.tflite").write_bytes(qjax.to_tflite(q, x))
    np.save(tmp_path / "x.npy", x)
    code = """
import sys
sys.modules["jax"] = None
import numpy as np
from ai_edge_litert.interpreter import Interpreter
network = Interpreter(model_path="model.tflite").get_signature_runner("serving_default")
np.save("logits.npy", network(input_0=np.load("x.npy"))["output_0"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    step = float(q.params["layers"]["head"].outputs.scale)
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, q.apply_fn(q.params, x), atol=1.01 * step)


def test_a_float_network_computes_the_same():
    from ai_edge_litert.interpreter import Interpreter

    x, params = small.images(5), small.make_params()
    interpreter = Interpreter(model_content=qjax.to_tflite(small.apply_fn, params, x))
    found = interpreter.get_signature_runner("serving_default")(input_0=x)["output_0"]
    np.testing.assert_allclose(found, small.apply_fn(params, x), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_bits": 4}, "layer '.*': `inputs` must have 8 bits, asymmetric, .* from 0 to 15"),
        ({"weight_bits": 9}, "layer '.*': `weights` must have at most 8 bits for LiteRT; got 9"),
    ],
)
def test_what_it_does_not_run_is_refused(changes: dict[str, Any], message: str):
    x = small.images(4)
    q = qjax.quantize(apply_fn, make_params(), x, qjax.recipe(8, **changes).naive())
    with pytest.raises(ValueError, match=message):
        qjax.to_tflite(q, x)
