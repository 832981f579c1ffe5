"""Networks of every kind in ONNX Runtime: what it computes is what qjax does, on integers."""

from pathlib import Path
from typing import Any

import jax
import models
import numpy as np
import pytest
from onnx_runtime import Run, quantized, run

import qjax

IDS = (
    *("linen_cnn", "linen_mobilenet", "linen_transformer", "nnx_cnn", "equinox_cnn", "haiku_cnn"),
    *("plain_nchw", "shared_kernel", "two_inputs", "grouped_dense", "linen_resnet", "nested"),
)
CASES = {case.id: case for case in models.CASES if case.id in IDS}
FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "NhwcFusedConv")


def first(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], tree)


def check(found: Run, expected: Any, tolerance: float) -> None:
    """Compares with the outputs for as many examples."""
    leaves = jax.tree.leaves(expected)
    for output, leaf in zip(found.outputs, leaves, strict=True):
        np.testing.assert_allclose(output, leaf[: len(output)], atol=tolerance, rtol=0)


@pytest.mark.parametrize("id", CASES)
def test_a_quantized_network_computes_the_same_with_integers(id: str, tmp_path: Path):
    case = CASES[id]
    q = quantized(case.apply_fn, case.params, case.x)
    model = qjax.to_onnx(q, case.x)
    expected = q.apply_fn(q.params, case.x)
    check(run(model, case.x), expected, 1e-5)
    check(run(model, first(case.x, 1)), expected, 1e-5)
    optimized = run(model, first(case.x, 3), tmp_path)
    check(optimized, expected, 1e-5)
    layers = optimized.operators["QLinearConv"] + optimized.operators["QGemm"]
    assert layers == len(case.expected)
    assert not [operator for operator in FLOAT if optimized.operators[operator]]
