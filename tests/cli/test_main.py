"""The command line as a whole: commands, help, and one line for what is wrong."""

import runpy
import sys
from pathlib import Path

import pytest

from qjax.cli.main import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantize.py"


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    for option in ("--bits", "--rounding", "--override", "--out", "--json", "--quiet"):
        assert option in text


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["study", "symmetry", "--report", "no/page.html"], "`--report` must name a file"),
        (["explain", "head", "--report", "no/page.html"], "`--report` must name a file"),
        (["explain", "stem"], "`LAYER` must be one of hidden, head; got 'stem'"),
        (["explain", "head", "--image", "300"], "`--image` must be from 0 to 299; got 300"),
        (["study", "everything"], "argument NAME: invalid choice: 'everything'"),
        (
            ["study", "weight-bits", "--widths", "0"],
            "argument --widths: expected a width from 1 to 16 bits; got '0'",
        ),
    ],
)
def test_a_command_says_what_is_wrong(
    command: list[str], reason: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*command, "--model", "tiny"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and reason in stderr


def test_the_script_is_the_same_command(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--bits", "40"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "`--bits` must be an integer from 1 to 16; got 40" in capsys.readouterr().err
