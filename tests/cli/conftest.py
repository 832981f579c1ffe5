"""What the commands find instead of real models and datasets."""

import math
from pathlib import Path

import pytest
from cli.tiny import Model, stand_in

from qjax import progress


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the commands compile: all tests share it, the user's is left alone."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps it there."""
    monkeypatch.setenv("QJAX_CACHE_DIR", str(cache_dir))


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps standard error the same on a slow machine."""
    monkeypatch.setattr(progress, "PERIOD", math.inf)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """The model `tiny` and its images."""
    return stand_in(monkeypatch)
