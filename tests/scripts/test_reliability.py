"""The script that tries to break qjax, for a few seconds: nothing is lost, nothing is unclear."""

import math
import platform
import sys
from pathlib import Path

import pytest

from qjax import progress

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import reliability_artifacts
import reliability_commands


def test_saves_that_are_killed_lose_nothing():
    cases = list(reliability_artifacts.killed_saves(2, seed=0, loads=20))
    assert len(cases) == 43
    assert not [case.failure for case in cases if case.failure]


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Atheris has no other wheels"
)
def test_manifests_are_led_by_coverage():
    cases = list(reliability_artifacts.guided_manifests(100, seed=0))
    assert not [case.failure for case in cases if case.failure]
    assert len(cases) == 100 and sum(case.was_refused for case in cases) > 50


@pytest.mark.parametrize(
    ("group", "count", "refused"),
    [
        ("damaged_recipes", 20, 10),
        ("damaged_images", 40, 20),
        ("damaged_weights", 40, 20),
        ("random_options", 15, 8),
    ],
)
def test_bad_input_is_refused_in_one_line(
    group: str, count: int, refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(progress, "PERIOD", math.inf)
    cases = list(getattr(reliability_commands, group)(count, seed=2))
    assert not [case.failure for case in cases if case.failure]
    assert len(cases) == count and refused <= sum(case.was_refused for case in cases)
