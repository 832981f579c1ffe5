"""`qjax export` and `qjax quantize --export`."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli.tiny import CHEAP, apply_fn, quantize
from onnx_runtime import run

import qjax
from pretrained import datasets
from qjax.cli.main import main

OPTIONS = [*CHEAP[:3], *"--reconstructions 0 --sweeps 0 --rounding nearest --no-sequential".split()]


def test_what_is_saved_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, files = str(tmp_path / "saved"), [str(tmp_path / f"{i}.onnx") for i in (1, 2)]
    command = ["quantize", "--model", "tiny", *OPTIONS, "--out", folder, "--export", files[0]]
    assert main(command) == 0
    assert f"exported     {files[0]}" in capsys.readouterr().out
    assert main(["export", folder, "--model", "tiny", "--to", "onnx", "--out", files[1]]) == 0
    assert "2.onnx (quantized tiny, " in capsys.readouterr().out
    q = qjax.load(folder, apply_fn)
    x = np.float32(datasets.load("noise", "test").images[:5]) / 255
    for file in files:
        [output] = run(onnx.load(file), x).outputs
        np.testing.assert_allclose(output, q.apply_fn(q.params, x), atol=1e-5)
    found = {entry.key: json.loads(entry.value) for entry in onnx.load(files[0]).metadata_props}
    assert found["float_top1"] == 75.0 and found["test_images"] == 300


def test_a_pretrained_model_is_exported_in_float(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "model.onnx"
    assert main(["export", "tiny", "--out", str(out)]) == 0
    assert "(float tiny, " in capsys.readouterr().out
    assert {node.op_type for node in onnx.load(out).graph.node} >= {"Gemm", "Relu"}


def test_a_saved_model_needs_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "`--model` must name the pretrained model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--export", "no/model.onnx"], "`--export` must name a file that can be written"),
        (["--export", "."], "`--export` must name a file that can be written"),
        (["--export", "m.onnx", "--bits", "12"], "`weights` must have at most 8 bits for ONNX"),
        (["--export", "m.onnx", "--target", "litert"], "`--target` must be one of onnxruntime"),
        (["--export", "m.onnx", "--target", "tvm"], "argument --target: invalid choice: 'tvm'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    options: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert quantize(*options) == 2
    stdout, stderr = capsys.readouterr()
    assert reason in stderr and stdout == "" and not list(tmp_path.iterdir())


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "tiny", "--out", str(tmp_path / "model.onnx")]) == 2
    assert 'pip install "qjax[export]"' in capsys.readouterr().err
