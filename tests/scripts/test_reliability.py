"""The script that tries to break qjax, for a few seconds: nothing is lost, nothing is unclear."""

import runpy
from pathlib import Path

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "reliability.py"))


def test_saves_that_are_killed_lose_nothing():
    cases = list(SCRIPT["killed_saves"](2, seed=0, loads=20))
    assert len(cases) == 43
    assert not [case.failure for case in cases if case.failure]
