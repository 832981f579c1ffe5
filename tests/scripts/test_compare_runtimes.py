"""`scripts/compare_runtimes.py`: what it says of runtimes that are not there, and what it keeps."""

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import compare_runtimes

    return compare_runtimes


def test_a_runtime_that_is_not_installed_is_named(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    missing = script.RUNTIMES[2]._replace(packages=("no_such_package",))
    monkeypatch.setattr(script, "RUNTIMES", (*script.RUNTIMES[:2], missing))
    monkeypatch.setattr(script, "compare", lambda name, folder, arguments: ([], "no images"))
    monkeypatch.setattr(sys, "argv", ["compare_runtimes", "--models", "mlp-mnist"])
    script.main()
    line = 'LiteRT is left out, as it is not installed: pip install -e ".[runtimes]"'
    assert line in capsys.readouterr().out.splitlines()


def test_results_are_kept_for_their_setting(script: Any, tmp_path: Path):
    path, results = tmp_path / "speed.json", [{"runtime": "JAX"}]
    assert script.read(path, {"threads": 1}) is None
    script.write(path, {"threads": 1}, results)
    assert script.read(path, {"threads": 1}) == results
    assert script.read(path, {"threads": 2}) is None


def test_a_network_without_weights_has_no_accuracy(script: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["compare_runtimes", "--models", "resnet18-cifar10"])
    with pytest.raises(SystemExit, match="no weights and no accuracy; pass --measure speed"):
        script.main()
