"""`--checkpoint`: what is finished is kept until the command has ended."""

import os
from pathlib import Path
from typing import Any

import pytest
from cli.tiny import CHEAP, quantize

from qjax.cli import checkpoint as option
from qjax.cli import widths
from qjax.cli.main import main
from qjax.fit import checkpoint
from qjax.study import questions


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_at(count: int, function: Any) -> Any:
    """The function, killed when it is called for that time."""
    calls = iter(range(count - 1))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return function(*args, **kwargs)

    return call


def result(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_quantize_goes_on(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("qjax.kept_arrays.PAUSE", 0)
    options = ["--checkpoint", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        write = checkpoint.Checkpoint.write
        patch.setattr(checkpoint.Checkpoint, "write", killed_at(2, write))
        with pytest.raises(Killed):
            quantize(*options)
    assert os.listdir(tmp_path / "kept") == [checkpoint.FILE]
    assert quantize(*options, "--bits", "3") == 2
    assert "`--checkpoint`" in (error := capsys.readouterr().err) and "recipe" in error
    assert quantize(*options) == 0
    assert quantize("--out", str(tmp_path / "whole")) == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"], "finished work is removed"


def test_average_bits_goes_on(tmp_path: Path, monkeypatch):
    options = ["--average-bits", "5", "--checkpoint", str(tmp_path / "kept")]
    with monkeypatch.context() as patch:
        patch.setattr(widths, "allocate", killed_at(1, None))
        with pytest.raises(Killed):
            quantize(*options)
    assert os.listdir(tmp_path / "kept") == [option.ROWS]
    monkeypatch.setattr(widths, "measure_sensitivities", killed_at(1, None))
    assert quantize(*options) == 0
    assert os.listdir(tmp_path) == []


def test_a_study_goes_on(tmp_path: Path, monkeypatch, capsys):
    study = ["study", "weight-bits", "--model", "tiny", *CHEAP[:3], "--widths", "3", "4"]
    assert main(study) == 0
    whole = capsys.readouterr().out
    study += ["--checkpoint", str(tmp_path / "kept")]
    row = questions.Measure.row
    with monkeypatch.context() as patch:
        patch.setattr(questions.Measure, "row", killed_at(2, row))
        with pytest.raises(Killed):
            main(study)
    with (tmp_path / "kept" / option.ROWS).open("a") as file:
        file.write('["4", [[], 9')  # the start of a line
    monkeypatch.setattr(questions.Measure, "row", killed_at(2, row))
    assert main(study) == 0
    assert capsys.readouterr().out == whole
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["quantize", "--search-bits"], "`--search-bits` keeps nothing"),
        (["quantize", "--data-free"], "leave out `--checkpoint`"),
        (["study", "training"], "leave out `--checkpoint`"),
    ],
)
def test_where_nothing_is_kept(options: list[str], message: str, tmp_path: Path, capsys):
    assert main([*options, "--model", "tiny", "--checkpoint", str(tmp_path / "kept")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
