"""Sums, concatenations and pools on codes: what ONNX Runtime fuses."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from onnx_runtime import Run, run

import qjax

FLOAT = ("Add", "Concat", "Conv", "Gemm", "GlobalAveragePool", "Relu")
FUSED = ("QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool")


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    x = conv(x, params["stem"])
    x = jax.nn.relu(x + conv(x, params["branch"]))
    x = jnp.concatenate([x, conv(x, params["more"])], -1)
    return x.mean((1, 2)) @ params["head"]


def make_params() -> Any:
    shapes = {"stem": (3, 3, 2, 4), "branch": (3, 3, 4, 4), "more": (1, 1, 4, 4), "head": (8, 3)}
    rng = np.random.default_rng(0)
    return {name: jnp.float32(rng.normal(size=shape) / 3) for name, shape in shapes.items()}


@pytest.mark.parametrize("sums", ["float", "quantized"])
def test_quantized_sums_leave_nothing_in_float(sums: Any, tmp_path: Path):
    x = small.images(8)
    q = qjax.quantize(apply_fn, make_params(), x, dataclasses.replace(small.CHEAP, sums=sums))
    model, expected = qjax.to_onnx(q, x), q.apply_fn(q.params, x)
    found: dict[str, Run] = {"plain": run(model, x), "optimized": run(model, x, tmp_path)}
    for result in found.values():
        np.testing.assert_allclose(result.outputs[0], expected, atol=1e-5, rtol=0)
    operators = found["optimized"].operators
    is_float = sums == "float"
    assert [operators[operator] for operator in FUSED] == [int(not is_float)] * 3
    assert any(operators[operator] for operator in FLOAT) == is_float
