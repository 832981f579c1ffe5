"""The tables of accuracy: pages are what the measurements say, and nothing is measured twice."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("evaluate")


def options(evaluate: Any, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(given)


def measured(row: str, column: str, seed: int, top1: float, error: float) -> dict[str, Any]:
    key = {"model": "a", "row": row, "column": column, "seed": seed}
    return key | {"top1": top1, "error": error, "calibration_images": 1024, "test_images": 100}


FLOAT = {"model": "a", "row": "float", "column": "float", "seed": 0, "top1": 91.0}
LINES = [
    FLOAT | {"test_images": 100},
    measured("weights", "8 bits", 0, 90.0, 1e-3),
    measured("weights", "8 bits", 1, 91.0, 3e-3),
]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "name",
    [
        "ablation",
        "attention",
        "calibration",
        "codebooks",
        "fixed-point",
        "mixed",
        "ranges",
        "tuning",
        "widths",
    ],
)
def test_a_page_is_what_its_measurements_say(name: str, evaluate: Any):
    page = ROOT / "docs" / f"results-{name}.md"
    lines = evaluate.read(page.with_suffix(".jsonl"))
    assert lines
    text = evaluate.document(evaluate.tables()[name], lines, f"python scripts/evaluate.py {name}")
    assert page.read_text(encoding="utf-8") == text


def test_cells_are_means_over_the_draws(evaluate: Any):
    text = evaluate.rows_of_markdown(evaluate.tables()["widths"], LINES, with_error=True)
    assert "| a | 91.00 | 2 | weights | 90.50 (2.0e-03) |  |" in text


def test_a_cell_that_lacks_draws_says_so(evaluate: Any):
    lines = [*LINES, measured("weights", "4 bits", 0, 80.0, 1e-3)]
    text = evaluate.rows_of_markdown(evaluate.tables()["widths"], lines, with_error=False)
    assert "| 90.50 |" in text and "| 80.00, 1 of 2 draws |" in text


def test_what_is_kept_is_not_measured_again(
    tmp_path: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "kept.jsonl", LINES)
    given = ["--models", "a", "--rows", "weights", "--columns", "8 bits", "--seeds", "0", "1"]
    arguments = options(evaluate, *given, "--results", str(tmp_path / "kept.jsonl"))

    def fail(*_: Any) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(evaluate, "Measuring", fail)
    evaluate.run("widths", arguments)
    assert "90.50" in (tmp_path / "kept.md").read_text()


def stub(evaluate: Any, monkeypatch: pytest.MonkeyPatch, used: int = 1024) -> Any:
    """Puts what only notes the ways that it is asked to measure in the place of `Measuring`."""

    class Stub:
        asked: ClassVar[list[tuple[Any, int, str]]] = []

        def __init__(self, *_: Any) -> None:
            self.used = used

        def of(self, way: Any, seed: int, error: str) -> dict[str, Any]:
            self.asked.append((way, seed, error))
            images = way.images or used
            return {"top1": 80.0, "error": 0.5, "calibration_images": images, "test_images": 100}

    monkeypatch.setattr(evaluate, "Measuring", Stub)
    return Stub


def test_what_is_missing_is_measured_and_appended(
    tmp_path: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
):
    measuring = stub(evaluate, monkeypatch)
    path = tmp_path / "kept.jsonl"
    write(path, LINES)
    given = ["--models", "a", "--rows", "weights", "--columns", "8 bits", "4 bits"]
    evaluate.run("widths", options(evaluate, *given, "--seeds", "1", "--results", str(path)))
    [(way, *others)] = measuring.asked
    assert (way.recipe.weights.bits, *others) == (4, 1, "error")
    assert evaluate.read(path)[:-1] == LINES
    assert evaluate.read(path)[-1]["column"] == "4 bits"


def test_a_way_may_have_a_number_of_images_of_its_own(
    tmp_path: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
):
    measuring = stub(evaluate, monkeypatch)
    path = tmp_path / "kept.jsonl"
    write(path, [FLOAT | {"test_images": 100}])
    given = ["--models", "a", "--rows", "4 bits, default", "--columns", "16", "256"]
    arguments = options(evaluate, *given, "--results", str(path))
    evaluate.run("calibration", arguments)
    assert [way.images for way, *_ in measuring.asked] == [16, 256]
    evaluate.run("calibration", arguments)
    assert len(measuring.asked) == 2
    assert "16 or 256 calibration images" in path.with_suffix(".md").read_text()


def test_the_page_of_networks_is_what_was_measured(evaluate: Any):
    zoo = evaluate.zoo
    known = zoo.measured(zoo.RESULTS)
    assert known and known.keys() <= zoo.zoo_networks.NETWORKS.keys()
    assert zoo.PAGE.read_text(encoding="utf-8") == zoo.document(known)


def test_the_page_of_photographs_is_what_was_measured(evaluate: Any):
    photographs = evaluate.photographs
    about, known = photographs.measured(photographs.RESULTS)
    text = photographs.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert text == photographs.document(*about.values(), known)


def test_measurements_are_forgotten_by_model_draw_row_and_column(tmp_path: Path, evaluate: Any):
    path = tmp_path / "kept.jsonl"
    write(path, LINES)
    given = ["--models", "a", "--seeds", "1", "--rows", "weights"]
    evaluate.forget(path, options(evaluate, *given))
    assert evaluate.read(path) == LINES[:2]


def test_another_number_of_images_is_refused(
    tmp_path: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
):
    stub(evaluate, monkeypatch, used=512)
    path = tmp_path / "kept.jsonl"
    write(path, LINES)
    given = ["--models", "a", "--calibration-size", "512", "--results", str(path)]
    with pytest.raises(SystemExit, match="1024 calibration images, not 512; pass --restart"):
        evaluate.run("widths", options(evaluate, *given))


def test_an_unknown_row_is_refused(tmp_path: Path, evaluate: Any):
    given = ["--rows", "biases", "--results", str(tmp_path / "kept.jsonl")]
    with pytest.raises(SystemExit, match="`--rows` must be of weights; .*; got 'biases'"):
        evaluate.run("widths", options(evaluate, *given))
