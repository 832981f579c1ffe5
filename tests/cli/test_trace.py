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

def attention():
    rng = np.random.default_rng(0)
    shapes = {"k": (3, 4), "q": (3, 4), "v": (3, 4), "head": (4, 3)}
    params = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    def apply_fn(params, x):
        x = x.reshape(x.shape[0], 4, 3).astype(np.float32)
        q, k, v = (x @ params[name] for name in "qkv")
        y = q @ k.swapaxes(-1, -2) @ v
        return y.mean(1) @ params["head"]
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


def test_labels_that_the_model_has_no_class_for_are_refused(capsys: pytest.CaptureFixture[str]):
    with np.load("own.npz") as arrays:
        np.savez("other.npz", **{**arrays, "y_test": arrays["y_test"] + 90})
    own = ["--model", "traced_network:make", "--dataset", "other.npz"]
    assert main(["quantize", *own]) == 2
    assert "`--dataset` other.npz has labels up to 92; the model" in capsys.readouterr().err


OWN = ["--model", "traced_network:attention", "--dataset", "own.npz"]


def test_products_of_two_activations(capsys: pytest.CaptureFixture[str]):
    assert main(["trace", *OWN]) == 0
    listed = capsys.readouterr().out
    assert "/matmul" not in listed and listed.count("a product of two activations") == 2
    assert main(["trace", *OWN, "--matmuls", "quantized"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    [row] = [words for words in lines if words[:1] == ["k/matmul"]]
    assert row == ["k/matmul", "matmul", "4×4", "4×4", "4×4", "none", "64"]
    assert not any("product" in words for words in lines)


def test_they_are_quantized_and_explained(capsys: pytest.CaptureFixture[str]):
    cheap = ["--range-method", "absmax", "--no-bias-correction", "--matmuls", "quantized"]
    assert main(["quantize", *OWN, *cheap, "--override", "v/matmul=6"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    widths = {words[0]: words for words in lines if len(words) > 4}
    assert "8/8/8" in widths["k/matmul"] and "6/6/6" in widths["v/matmul"]
    assert main(["explain", "k/matmul", *OWN, *cheap]) == 0
    assert "codes of the second operand" in capsys.readouterr().out
    assert main(["explain", "k/matmul", *OWN, *cheap, "--ranges"]) == 2
    assert "'k/matmul' is a product of two activations" in capsys.readouterr().err


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
