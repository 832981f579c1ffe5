"""`qjax study`: a table of several ways to quantize, in text and on a page."""

from pathlib import Path

import pytest
from cli.tiny import CHEAP

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
