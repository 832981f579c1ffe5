"""`qjax accumulators`: two tables, and what they rest on."""

import pytest
from cli.tiny import CHEAP

from qjax.cli.main import main


def test_accumulators_are_measured_and_narrowed(capsys: pytest.CaptureFixture[str]):
    options = ["--model", "tiny", *CHEAP[:3], "--widths", "4", "20", "--overflow", "wrap"]
    assert main(["accumulators", *options]) == 0
    stdout = capsys.readouterr().out
    ranges, accuracies, *_ = stdout.split("\n\n")
    assert [line.split()[0] for line in ranges.splitlines()] == ["layer", "hidden", "head"]
    rows = [line.split() for line in accuracies.splitlines()[1:]]
    assert [bits for bits, _ in rows] == ["4", "20", "32"]
    assert rows[1][1] == rows[2][1] != rows[0][1]
    assert "300 test images of noise" in stdout and "wrap, checked after every sum" in stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--widths", "1"], "`--widths` must be from 2 to 32 bits; got [1]"),
        (["--input-bits", "float"], "integer accumulators need quantized weights and inputs"),
    ],
)
def test_what_no_accumulator_has_is_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["accumulators", "--model", "tiny", *options]) == 2
    assert reason in capsys.readouterr().err
