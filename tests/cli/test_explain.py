"""`qjax explain`: one layer in text and on a page."""

from pathlib import Path

import pytest
from cli.tiny import CHEAP

from qjax.cli.main import main


def test_explain_follows_a_layer(capsys: pytest.CaptureFixture[str]):
    options = ["--model", "tiny", *CHEAP[:3], "--image", "7", "--ranges", "--bits", "5"]
    assert main(["explain", "hidden", *options]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == "" and max(map(len, stdout.splitlines())) <= 100
    assert stdout.startswith("hidden: dense 16×8, activation relu\n")
    for part in ("input codes", "accumulator", "requantization", "de-quantization"):
        assert part in stdout
    for tensor in ("weights", "input", "output"):
        assert f"the range of the {tensor}, 5 bits" in stdout
    assert stdout.count("  best") == 3


def test_explain_draws_a_page(tmp_path: Path):
    path = tmp_path / "page.html"
    options = ["--model", "tiny", *CHEAP[:3], "--report", str(path)]
    assert main(["explain", "hidden", *options]) == 0
    drawn = path.read_text()
    assert "<h1>tiny, hidden: how the ranges were found</h1>" in drawn
    assert drawn.count("<svg") == 3 and drawn.count('class="curve output_mse"') == 3
    assert list(tmp_path.iterdir()) == [path]
