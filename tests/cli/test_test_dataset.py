"""`--test-dataset`: a set that was neither trained nor calibrated on, read as TFDS stores it."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli.tiny import CHEAP
from tfds_layout import Record, write_dataset

import pretrained
from qjax.cli.main import main

NETWORK = pretrained.load("mlp-mnist")


def draw_images(seed: int, size: int) -> np.ndarray:
    """Coarse patterns of strokes: uint8[size, 28, 28, 1]."""
    coarse = np.random.default_rng(seed).integers(0, 2, (size, 7, 7, 1), np.uint8) * 255
    return coarse.repeat(4, 1).repeat(4, 2)


def predictions(images: np.ndarray) -> np.ndarray:
    return np.asarray(NETWORK.apply_fn(NETWORK.params, NETWORK.preprocess(images)).argmax(-1))


def records(images: np.ndarray, labels: np.ndarray) -> list[Record]:
    return [Record(image, int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fashion-MNIST, of which every fifth label is wrong, EMNIST digits and letters, and colours.

    TFDS stores EMNIST with rows and columns exchanged. The other labels are what `mlp-mnist` sees.
    """
    folder = tmp_path / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setenv("QJAX_CACHE_DIR", str(tmp_path / "cache"))
    fashion = draw_images(0, 30)
    wrong = np.arange(len(fashion)) % 5 == 0
    splits = dict.fromkeys(("train", "test"), records(fashion, predictions(fashion) ^ wrong))
    write_dataset(folder, "fashion_mnist", "3.0.1", splits)
    digits = draw_images(1, 20)
    stored = records(digits.swapaxes(1, 2), predictions(digits))
    write_dataset(folder, "emnist/digits", "3.1.0", {"test": stored})
    letters = records(digits, 26 - np.arange(len(digits)))
    write_dataset(folder, "emnist/letters", "3.1.0", {"test": letters}, classes=37)
    colours = records(digits.repeat(3, -1), np.zeros(len(digits)))
    write_dataset(folder, "colours", "1.0.0", {"test": colours})
    return folder


def run(*command: str) -> int:
    quick = ["--rounding", "nearest", "--sweeps", "0", "--reconstructions", "0", "--no-sequential"]
    model = ["--model", "mlp-mnist", "--dataset", "fashion_mnist"]
    return main([*command, *model, *CHEAP[:3], *quick])


def test_another_set_is_evaluated_and_named(capsys: pytest.CaptureFixture[str]):
    digits = draw_images(1, 20)
    assert (predictions(digits.swapaxes(1, 2)) != predictions(digits)).any(), "else no test"
    assert run("quantize", "--json") == 0
    own = capsys.readouterr().out
    assert run("quantize", "--json", "--test-dataset", "emnist/digits") == 0
    other = capsys.readouterr().out
    before, after = (json.loads(out.splitlines()[-1]) for out in (own, other))
    assert before["dataset"] == after["dataset"] == before["test_dataset"] == "fashion_mnist"
    assert (after["test_dataset"], after["test_images"]) == ("emnist/digits", 20)
    assert before["float_top1"] == 80.0
    assert after["float_top1"] == 100.0, "upright"
    assert before["layers"] == after["layers"], "calibrated on the same images"
    assert "30 test images of fashion_mnist" in own and "20 test images of emnist/digits" in other
    for out in (own, other):
        assert "30 training images of fashion_mnist, without labels" in out


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["study", "weight-bits", "--widths", "12"], "float        100.00"),
        (["accumulators", "--widths", "32"], "top-1 in percent of 20 test images"),
    ],
)
def test_other_commands_evaluate_another_set(
    command: list[str], found: str, capsys: pytest.CaptureFixture[str]
):
    assert run(*command, "--test-dataset", "emnist/digits") == 0
    out = capsys.readouterr().out
    assert "20 test images of emnist/digits" in out and found in out


def test_explain_follows_an_image_of_another_set(capsys: pytest.CaptureFixture[str]):
    assert run("explain", "head", "--image", "20", "--test-dataset", "emnist/digits") == 2
    assert "`--image` must be from 0 to 19; got 20." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("colours", "has images of shape (28, 28, 3); the model mlp-mnist is calibrated on images"),
        ("emnist/letters", "has labels up to 26; the model mlp-mnist has 10 classes, 0 to 9."),
        ("digits", "has images of shape (8, 8, 1)"),
        ("nonsense", "`name` must be 'digits' or a TFDS dataset, got 'nonsense'"),
    ],
)
def test_a_set_that_the_model_has_no_answers_for_is_refused(
    name: str, reason: str, capsys: pytest.CaptureFixture[str]
):
    assert run("quantize", "--test-dataset", name) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1
    assert stderr.startswith(f"qjax: error: `--test-dataset` {name}") and reason in stderr


def test_a_set_without_test_images_is_refused(data_dir: Path, capsys: pytest.CaptureFixture[str]):
    images = draw_images(2, 1)
    write_dataset(data_dir, "unsplit", "1.0.0", {"train": records(images, predictions(images))})
    assert run("quantize", "--test-dataset", "unsplit") == 2
    assert "`--test-dataset` unsplit: `split` must be one of ['train']" in capsys.readouterr().err
