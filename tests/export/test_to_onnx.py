"""`qjax.to_onnx`: what the model holds, what it takes, and what is refused."""

import collections
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import onnx
import pytest
import small
from onnx_runtime import quantized, run

import qjax
from qjax.objectives.table import OBJECTIVES

CASES = {case.id: case for case in models.CASES}


def operators(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


@pytest.fixture(scope="module")
def q() -> qjax.Quantized:
    return quantized(small.apply_fn, small.make_params(), small.images(2))


def test_the_model_says_what_it_is():
    q = small.quantized()
    model = qjax.to_onnx(q, small.images(2), metadata={"top1": 92.5})
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert qjax.Recipe.from_json(found["recipe"]) == q.report.recipe
    assert found["versions"]["jax"] == jax.__version__
    assert [layer["name"] for layer in found["layers"]] == ["conv", "head"]
    assert (found["target"], found["top1"]) == ("onnxruntime", 92.5)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == [
        "input",
        "output",
    ]


def test_kernels_are_int8_and_biases_int32(q: qjax.Quantized):
    model = qjax.to_onnx(q, small.images(2))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["conv/kernel"] == types["head/kernel"] == onnx.TensorProto.INT8
    assert types["conv/bias"] == onnx.TensorProto.INT32
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all(np.prod(tensor.dims) <= 6 for tensor in floats), "scales alone"


def test_names_come_from_the_pytrees():
    case = CASES["two_inputs"]
    model = qjax.to_onnx(case.apply_fn, case.params, case.x)
    assert [value.name for value in model.graph.input] == ["image", "vector"]
    assert [value.name for value in model.graph.output] == ["norm", "score"]


@pytest.mark.parametrize("id", ["linen_transformer", "activations"])
def test_a_float_network_computes_the_same(id: str, tmp_path: Path):
    case = CASES[id]
    model = qjax.to_onnx(case.apply_fn, case.params, case.x)
    expected = jax.tree.leaves(jax.jit(case.apply_fn)(case.params, case.x))
    for folder in (None, tmp_path):
        for output, leaf in zip(run(model, case.x, folder).outputs, expected, strict=True):
            np.testing.assert_allclose(output, leaf, atol=1e-5, rtol=1e-5)


def test_channels_last_are_transposed_once():
    case = CASES["linen_mobilenet"]
    model = qjax.to_onnx(case.apply_fn, case.params, case.x)
    assert operators(model)["Transpose"] == 1


def test_a_packed_network_is_unpacked(q: qjax.Quantized):
    x = small.images(2)
    model, packed = (qjax.to_onnx(v, x) for v in (q, q._replace(params=qjax.pack(q.params))))
    assert model == packed


# ---- Formats


def checked(q: qjax.Quantized, x: Any, target: str = "onnxruntime") -> onnx.ModelProto:
    """A model that computes what the quantized network does."""
    model = qjax.to_onnx(q, x, target=target)
    [output] = run(model, x).outputs
    np.testing.assert_allclose(output, q.apply_fn(q.params, x), atol=1e-5)
    return model


def test_signed_activations_are_clipped_first():
    recipe = qjax.recipe(8, target="tensorrt")
    x = small.images(3)
    q = quantized(small.apply_fn, small.make_params(), x, recipe)
    model = checked(q, x, "tensorrt")
    zero_points = [t for t in model.graph.initializer if t.name.endswith("/zero_point")]
    assert zero_points and all(not t.raw_data.strip(b"\0") for t in zero_points)
    nodes = [node.op_type for node in model.graph.node]
    conv = nodes.index("Conv")
    assert nodes[conv : conv + 3] == ["Conv", "Relu", "QuantizeLinear"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight_bits": 4}, r"conv \(weights of 4 bits\), head \(weights of 4 bits\)"),
        ({"inputs": None}, r"conv \(its input is in float\)"),
        ({"outputs": None}, r"conv \(its output is in float\); the model"),
        (
            {"weights": qjax.QuantSpec(8, granularity="per_group", group_size=2)},
            r"conv \(weights with a scale per group\)",
        ),
    ],
)
def test_codes_that_are_only_stored_are_named(fields: dict[str, Any], reason: str):
    x = small.images(2)
    q = quantized(small.apply_fn, small.make_params(), x, qjax.recipe(8, **fields))
    with pytest.warns(UserWarning, match=f"ONNX Runtime computes in float in the layers {reason}"):
        checked(q, x)


def test_four_bits_are_stored_two_to_a_byte():
    x = small.images(2)
    q = quantized(small.apply_fn, small.make_params(), x, qjax.recipe(8, weight_bits=4))
    with pytest.warns(UserWarning, match="weights of 4 bits"):
        model = qjax.to_onnx(q, x)
    [kernel] = (t for t in model.graph.initializer if t.name == "conv/kernel")
    assert kernel.data_type == onnx.TensorProto.INT4
    assert len(kernel.raw_data) == 2 * 2 * 2 * 6 // 2


@pytest.mark.parametrize("size", [16, 32])
def test_blocks_of_four_bits_are_multiplied_as_they_are(size: int, tmp_path: Path):
    rng = np.random.default_rng(0)
    shapes = {"up": (63, 32), "bias": (1, 32), "down": (32, 6)}
    params = {name: jnp.float32(rng.normal(size=shape) / 6) for name, shape in shapes.items()}
    x = np.float32(rng.normal(size=(3, 63)))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]

    weights = qjax.QuantSpec(4, granularity="per_group", group_size=size)
    recipe = qjax.recipe(8, weights=weights, inputs=None, outputs=None).naive()
    q = qjax.quantize(apply_fn, params, x, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = checked(q, x)
    kernels = [t for t in model.graph.initializer if t.name.endswith("kernel")]
    assert [tuple(t.dims) for t in kernels] == [
        (32, 64 // size, size // 2),
        (6, 32 // size, size // 2),
    ]
    optimized = run(model, x, tmp_path)
    np.testing.assert_allclose(optimized.outputs[0], q.apply_fn(q.params, x), atol=1e-5)
    assert optimized.operators["MatMulNBits"] == 2
    with pytest.warns(UserWarning, match="OpenVINO computes in float in the layers up"):
        assert operators(checked(q, x, "openvino"))["MatMulNBits"] == 0


def test_narrow_activations_are_clipped():
    x = small.images(2)
    q = quantized(small.apply_fn, small.make_params(), x, qjax.recipe(8, input_bits=5))
    assert operators(checked(q, x))["Min"] == 2


def test_a_layer_that_stays_in_float_is_no_reason_to_warn():
    x = small.images(2)
    overrides = {"conv": {"weights": None, "inputs": None, "outputs": None}}
    q = quantized(small.apply_fn, small.make_params(), x, qjax.recipe(8, overrides=overrides))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(q, x)


def test_a_scale_per_channel_of_the_input_is_part_of_the_kernel():
    cheap = {"rounding": "nearest", "reconstructions": 0, "sweeps": 0, "sequential": False}
    x = np.abs(small.images(8)) * np.float32([1, 9])
    inputs = qjax.QuantSpec(8, symmetric=False, granularity="per_channel")
    recipe = qjax.recipe(8, inputs=inputs, range_method="absmax", **cheap)
    q = qjax.quantize(small.apply_fn, small.make_params(), x, recipe)
    assert q.params["layers"]["conv"].folds_input_scales
    checked(q, x)


# ---- What is refused


def test_a_layer_over_8_bits_is_refused():
    x = small.images(2)
    recipe = qjax.recipe(8, overrides={"head": {"bits": 12}})
    q = quantized(small.apply_fn, small.make_params(), x, recipe)
    with pytest.raises(ValueError, match="layer 'head': `weights` must have at most 8 bits for ON"):
        qjax.to_onnx(q, x)


@pytest.mark.parametrize("target", ["tvm", "litert"])
def test_an_unknown_target_is_refused(target: str, q: qjax.Quantized):
    with pytest.raises(ValueError, match="`target` must be one of onnxruntime, openvino, tensorrt"):
        qjax.to_onnx(q, small.images(2), target=target)


def test_a_target_of_other_codes_is_refused(q: qjax.Quantized):
    with pytest.raises(ValueError, match="`inputs` must be symmetric for TensorRT"):
        qjax.to_onnx(q, small.images(2), target="tensorrt")


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="`network` has no layer"):
        qjax.to_onnx(lambda params, x: x + params, jnp.ones((1, 3)), jnp.ones((2, 3)))


def test_other_arguments_are_refused(q: qjax.Quantized):
    with pytest.raises(TypeError, match=r"takes \(q, x\) here; got 3 arguments"):
        qjax.to_onnx(q, small.make_params(), small.images(2))
    with pytest.raises(TypeError, match=r"takes \(apply_fn, params, x\) here; got 2 arguments"):
        qjax.to_onnx(small.apply_fn, small.images(2))


REFUSED: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "sort": (jnp.sort, "`sort` after layer 'w', of shapes (2, 4), has no rule in qjax.export"),
    "reverse_batch": (lambda y: y / y.shape[0], "it uses the constant 2.0 in the first one"),
    "joined": (lambda y: jnp.concatenate([y, y[:1]]), "it makes axes of 3 and 4"),
    "positions": (
        lambda y: y + jnp.arange(float(y.shape[0]))[:, None],
        "after layer 'w' stands a constant with other values for every example, of shape (2, 1)",
    ),
    "first": (lambda y: y[:-1], "it makes axes of 1 and 2"),
}


@pytest.mark.parametrize("id", REFUSED)
def test_what_has_no_rule_is_named(id: str):
    function, reason = REFUSED[id]
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError) as error:
        qjax.to_onnx(lambda params, x: function(x @ params["w"]), params, jnp.ones((2, 3)))
    assert reason in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, q: qjax.Quantized):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "qjax\[export\]"'):
        qjax.to_onnx(q, small.images(2))


def test_nothing_else_loads_onnx():
    code = "import sys, qjax, qjax.cli.main; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_relu_is_the_clamp_of_the_codes(method: str, tmp_path: Path):
    q, x = small.quantized(range_method=method), small.images()
    operators = run(qjax.to_onnx(q, x), x, tmp_path).operators
    assert operators["QLinearConv"] == 1 and not operators["Relu"]
