"""Widths that are found: one for all layers, or one for every layer within a budget."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.tiny import quantize

from qjax.cli.main import main


def found_in(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What was printed, and the JSON of its last line."""
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_search_bits_starts_low(capsys: pytest.CaptureFixture[str]):
    assert quantize("--search-bits", "90", "--json") == 0
    stdout = capsys.readouterr().out
    rows = stdout[: stdout.index("layer ")].splitlines()
    tried = [int(line.split()[0]) for line in rows if line[:1].isdigit()]
    result = json.loads(stdout.splitlines()[-1])
    assert tried == list(range(2, 2 + len(tried))) and 1 < len(tried) < 15
    assert {layer["weight_bits"] for layer in result["layers"]} == {tried[-1]}
    assert result["recipe"]["inputs"] is None


def test_average_bits_gives_widths_that_can_be_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert quantize("--average-bits", "4.5", "--json") == 0
    out, result = found_in(capsys)
    assert "mean bits" in out
    widths = [layer["weight_bits"] for layer in result["layers"]]
    sizes = [np.prod(layer["kernel_shape"]) for layer in result["layers"]]
    assert np.average(widths, weights=sizes) <= 4.5
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    assert main(["quantize", "--model", "tiny", "--recipe", str(file), "--json"]) == 0
    _, again = found_in(capsys)
    assert [layer["weight_bits"] for layer in again["layers"]] == widths
    assert again["quantized_top1"] == result["quantized_top1"]


def test_max_bytes_bounds_what_is_stored(capsys: pytest.CaptureFixture[str]):
    assert quantize("--json") == 0
    _, at_8_bits = found_in(capsys)
    budget = at_8_bits["bytes_quantized"] - 10
    assert quantize("--max-bytes", str(budget), "--json") == 0
    _, result = found_in(capsys)
    assert result["bytes_quantized"] <= budget
    assert quantize("--max-bytes", "3") == 2
    assert "`--max-bytes` must be at least" in capsys.readouterr().err


def test_target_drop_says_what_it_expects_to_lose(capsys: pytest.CaptureFixture[str]):
    assert quantize("--target-drop", "50", "--json") == 0
    out, result = found_in(capsys)
    assert "estimated loss of accuracy, without labels" in out
    assert result["layers"][0]["weight_bits"] == 2, "almost any loss is allowed"


def test_a_target_leaves_alone_what_overrides_give(capsys: pytest.CaptureFixture[str]):
    assert quantize("--target-drop", "50", "--override", "hid*=8", "--json") == 0
    _, result = found_in(capsys)
    assert [layer["weight_bits"] for layer in result["layers"]] == [8, 2]


def test_budgets_exclude_each_other(capsys: pytest.CaptureFixture[str]):
    assert quantize("--average-bits", "4", "--max-bytes", "9") == 2
    assert "not allowed with" in capsys.readouterr().err
