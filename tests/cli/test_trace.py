"""`qjax trace`, and a model and images of one's own."""

from pathlib import Path

import numpy as np
import pytest

from qjax.cli.main import main

MODULE = """
import numpy as np

def make():
    params = {"hidden": np.ones((12, 3), np.float32), "head": np.eye(3, dtype=np.float32)}
    def apply_fn(params, x):
        y = np.float32(1) * x.reshape(x.shape[0], -1) @ params["hidden"]
        return y @ params["head"]
    return apply_fn, params

def empty():
    return (lambda params, x: x), {}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traced_network.py").write_text(MODULE)
    images = np.random.default_rng(0).integers(0, 255, (9, 2, 2, 3), np.uint8)
    labels = np.arange(9) % 3
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.chdir(tmp_path)


def test_the_layers_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["trace", "--model", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["hidden", "dense", "16×8", "16", "8", "relu", "128"]
    assert lines[-1].split() == ["2", "layers", "208"]


def test_a_model_and_images_of_ones_own(capsys: pytest.CaptureFixture[str]):
    own = ["--model", "traced_network:make"]
    assert main(["trace", *own, "--dataset", "own.npz"]) == 0
    assert "hidden" in capsys.readouterr().out
    cheap = ["--range-method", "absmax", "--input-bits", "float", "--no-bias-correction"]
    assert main(["quantize", *own, "--dataset", "own.npz", *cheap]) == 0
    assert "9 test images of own.npz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["traced_network:make"], "`--dataset` must name the images of traced_network:make"),
        (["traced_network:make", "--dataset", "no.npz"], "`--dataset` no.npz: no.npz is no .npz"),
        (["traced_network:empty", "--dataset", "own.npz"], "has no layer to quantize"),
    ],
)
def test_what_is_wrong_is_said(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", "--model", *options]) == 2
    assert reason in capsys.readouterr().err
