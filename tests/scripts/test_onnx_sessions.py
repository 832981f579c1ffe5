"""ONNX Runtime's own quantization of networks that it has no symbolic shapes for."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_a_causal_transformer_is_quantized(module: Any):
    sessions, networks = module("onnx_sessions"), module("zoo_networks")
    network = networks.NETWORKS["transformer"]
    apply_fn, params = network.make()
    x = np.random.default_rng(0).normal(size=(8, *network.example)).astype(np.float32)
    floats = qjax.to_onnx(apply_fn, params, x[:1])
    run, _ = sessions.session(0, sessions.quantize_static(floats, x))
    expected = np.asarray(apply_fn(params, x))
    error = np.square(run(x) - expected).sum() / np.square(expected).sum()
    assert 0 < error < 0.1
