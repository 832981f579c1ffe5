"""Products of two activations on codes: what ONNX Runtime fuses, and what LiteRT reads."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import attention
import numpy as np
import pytest
import small
from attention import NETWORKS, Network
from onnx_runtime import run

import qjax

QUANTIZED = dataclasses.replace(small.CHEAP, matmuls="quantized")


@functools.cache
def quantized(network: Network, **changes: Any) -> qjax.Quantized:
    recipe = dataclasses.replace(QUANTIZED, **changes)
    return qjax.quantize(*network.make(), attention.inputs(), recipe)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_onnx_runtime_multiplies_codes(network: Network, tmp_path: Path):
    q, x = quantized(network), attention.inputs(8, 5)
    model, expected = qjax.to_onnx(q, x), q.apply_fn(q.params, x)
    plain, optimized = run(model, x), run(model, x, tmp_path)
    for found in (plain, optimized):
        np.testing.assert_allclose(found.outputs[0], expected, atol=1e-5, rtol=0)
    assert plain.operators["MatMul"] == len(network.matmuls)
    assert optimized.operators["QLinearMatMul"] == len(network.matmuls)
    assert optimized.operators["MatMul"] == optimized.operators["Einsum"] == 0


def test_results_in_float(tmp_path: Path):
    q, x = quantized(NETWORKS[0], outputs=None), attention.inputs(8, 5)
    model, expected = qjax.to_onnx(q, x), q.apply_fn(q.params, x)
    np.testing.assert_allclose(run(model, x).outputs[0], expected, atol=1e-5, rtol=0)
    operators = run(model, x, tmp_path).operators
    assert operators["MatMul"] == 0
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == 2


def test_without_quantized_matmuls_they_stay_in_float(tmp_path: Path):
    q, x = quantized(NETWORKS[0], matmuls="float"), attention.inputs(8, 5)
    operators = run(qjax.to_onnx(q, x), x, tmp_path).operators
    assert operators["QLinearMatMul"] == 0


def test_what_a_target_cannot_run_is_refused():
    wide = qjax.QuantSpec(12, False, "per_tensor")
    q = quantized(NETWORKS[0], overrides=(("k/matmul", (("inputs", wide),)),))
    with pytest.raises(ValueError, match="layer 'k/matmul': `inputs` must have at most 8 bits"):
        qjax.to_onnx(q, attention.inputs(2))


def test_tensorrt_has_symmetric_operands():
    recipe = qjax.recipe(8, target="tensorrt", matmuls="quantized").naive()
    network, x = NETWORKS[0], attention.inputs(8, 5)
    q = qjax.quantize(*network.make(), attention.inputs(), recipe)
    for matmul in q.params["matmuls"].values():
        assert all(int(grid.zero_point) == 0 for grid in matmul)
    found = run(qjax.to_onnx(q, x, target="tensorrt"), x).outputs[0]
    np.testing.assert_allclose(found, q.apply_fn(q.params, x), atol=1e-5, rtol=0)
