"""`qjax study`: a table of several ways to quantize, in text and on a page."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cli.tiny import CHEAP, Model

from qjax.cli.main import main


def test_study_answers_a_question(capsys: pytest.CaptureFixture[str]):
    assert main(["study", "weight-bits", "--model", "tiny", *CHEAP, "--widths", "3", "12"]) == 0
    stdout = capsys.readouterr().out
    rows = [line.split() for line in stdout.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["3", "12"]
    assert rows[1][1:3] == ["75.00", "100.0"], "12 bits are as good as float"
    assert "300 test images of noise" in stdout and "40 calibration images" in stdout


def test_study_draws_a_page(tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text("an older page")
    options = ["--model", "tiny", *CHEAP[:3], "--report", str(path)]
    assert main(["study", "weight-bits", *options, "--widths", "3", "12"]) == 0
    drawn = path.read_text()
    assert drawn.count("<tr>") == 4 and drawn.count('style="width: 75.00%"') >= 2
    assert list(tmp_path.iterdir()) == [path]


TRAINING = "study training --model deep --widths 3 1 --seeds 0 1 --methods lsq xnor".split()


def apply_deep(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"]["w"])
    return jax.nn.relu(x @ params["middle"]["w"]) @ params["head"]["w"]


@pytest.fixture
def deep(stand_ins: dict[str, Model]) -> None:
    """A model with a layer between its first and its last."""
    tiny = stand_ins["tiny"]
    params = {**tiny.params, "middle": {"w": jnp.eye(8)}}
    stand_ins["deep"] = tiny._replace(name="deep", apply_fn=apply_deep, params=params)


@pytest.mark.usefixtures("deep")
def test_study_compares_with_training(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "page.html"
    assert main([*TRAINING, "--report", str(path)]) == 0
    stdout = capsys.readouterr().out
    rows = [line.split() for line in stdout.splitlines() if line[:1].isdigit()]
    assert [row[:3] for row in rows] == [
        ["3", "3/3/3", "lsq"],
        ["1", "1/1/8", "xnor"],
    ]
    assert all(row.count("±") == 2 for row in rows)
    assert "300 test images of noise" in stdout and "seeds 0, 1" in stdout
    assert path.read_text().count('<div class="part"') == 4
    assert main(TRAINING) == 0
    assert capsys.readouterr().out == stdout, "finished work is read back"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["study", "symmetry", "--epochs", "2"], "`--epochs` is of the study training"),
        (["study", "training", "--rounding", "nearest"], "has recipes of its own"),
        (["study", "training", "--calibration-size", "9"], "leave out `--calibration-size`"),
        (["study", "training", "--epochs", "0"], "`--epochs` must be positive; got 0"),
        (["study", "training", "--widths", "1", "--methods", "lsq"], "`--methods` has none"),
    ],
)
def test_study_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*options, "--model", "tiny"]) == 2
    assert message in capsys.readouterr().err
