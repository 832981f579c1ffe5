"""Reference models on test images in ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest
from onnx_runtime import run

import pretrained
import qjax
from pretrained import datasets


@pytest.mark.parametrize("name", ["lenet5-mnist", "resnet20-digits"])
def test_the_classes_are_the_same(name: str, tmp_path: Path):
    model = pretrained.load(name)
    images = datasets.load(model.dataset, "test").images[:300]
    x = np.asarray(model.preprocess(images))
    recipe = qjax.recipe(8, target="onnxruntime").naive()
    q = qjax.quantize(model.apply_fn, model.params, x[:100], recipe)
    exported = qjax.to_onnx(q, x)
    logits = np.asarray(q.apply_fn(q.params, x))
    [plain] = run(exported, x).outputs
    near = np.abs(plain - logits).max(-1) < 1e-5
    assert near.mean() > 0.9, "elsewhere a code was rounded the other way"
    optimized = run(exported, x, tmp_path)
    classes = optimized.outputs[0].argmax(-1)
    assert (classes == logits.argmax(-1)).mean() >= 0.995
    layers = optimized.operators["QLinearConv"] + optimized.operators["QGemm"]
    assert layers == len(q.report)
    assert not optimized.operators["Conv"] and not optimized.operators["Gemm"]
