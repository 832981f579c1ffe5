"""The compilation cache: filled by a first run, used by a second, and nobody's trouble."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from cli.tiny import CHEAP, quantize
from jax.experimental.compilation_cache import compilation_cache

CHEAPER = ["--rounding", "nearest", "--reconstructions", "0", "--sweeps", "0"]
TESTS = Path(__file__).parents[1]
EVENTS = "/jax/compilation_cache/"
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
# Runs the command line on the stand-ins; the last line says how often each event happened.
RUN = """
import collections, json, sys
import jax, pytest
from cli.tiny import stand_in
from qjax.cli.main import main

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
stand_in(pytest.MonkeyPatch())
code = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(code)
"""


def run_in_own_process(folder: Path) -> tuple[Counter[str], str, str]:
    """Quantizes the stand-in with a cache there: (cache events, standard output, error)."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"QJAX_CACHE_DIR": str(folder), "PYTHONPATH": path}
    command = ["quantize", "--model", "tiny", *CHEAP, *CHEAPER]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = done.stdout.splitlines()
    events = json.loads(last)
    counts = Counter({e.removeprefix(EVENTS): n for e, n in events.items() if EVENTS in e})
    return counts, "\n".join(line for line in lines if "calibration" not in line), done.stderr


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*-cache") if path.is_file())


@pytest.fixture(autouse=True)
def no_other_cache() -> Iterator[None]:
    """The folder that the tests share is out of use, and so is what other tests compiled."""
    jax.clear_caches()
    shared = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", shared)
    compilation_cache.reset_cache()


def options() -> list[Any]:
    return [getattr(jax.config, name) for name in OPTIONS]


def test_a_second_process_compiles_next_to_nothing(tmp_path: Path):
    folder = tmp_path / "new" / "cache"
    cold, first, stderr = run_in_own_process(folder)
    assert stderr == "" and cold["cache_misses"] > 10
    assert len(entries(folder)) == cold["cache_misses"]
    warm, second, stderr = run_in_own_process(folder)
    assert stderr == "" and second == first
    assert warm["cache_hits"] >= cold["cache_misses"]
    assert warm["cache_misses"] <= 0.05 * warm["cache_hits"]


def test_a_damaged_entry_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QJAX_CACHE_DIR", str(tmp_path))
    assert quantize(*CHEAPER) == 0
    assert entries(tmp_path)
    for path in entries(tmp_path):
        path.write_bytes(path.read_bytes()[:-10])
    assert quantize(*CHEAPER) == 0  # a warning would be an error here


def test_it_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QJAX_CACHE_DIR", str(tmp_path))
    assert quantize("--no-compilation-cache", *CHEAPER) == 0
    assert list(tmp_path.iterdir()) == []


def test_only_the_user_can_write_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QJAX_CACHE_DIR", str(tmp_path))
    assert quantize(*CHEAPER) == 0
    assert entries(tmp_path)
    if sys.platform != "win32":
        assert (tmp_path / "xla").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("quiet", [False, True])
def test_a_folder_that_cannot_be_written_is_no_error(
    quiet: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QJAX_CACHE_DIR", str(tmp_path / "file"))
    assert quantize(*CHEAPER, *["--quiet"] * quiet) == 0
    stdout, stderr = capsys.readouterr()
    assert "2 layers" in stdout
    assert stderr.count("\n") == (0 if quiet else 1)
    assert quiet or stderr.startswith("qjax: note: no compilation cache: ")


@pytest.mark.parametrize("bits", ["8", "1"])
def test_no_option_of_jax_is_left_set(bits: str, cache_dir: Path):
    before = options()
    quantize("--bits", bits, *CHEAPER)
    assert options() == before
    kept = entries(cache_dir)
    jax.jit(lambda x: x * 3 + 41)(1.0)
    assert entries(cache_dir) == kept


def test_options_of_jax_that_name_a_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = getattr(jax.config, OPTIONS[0])
    jax.config.update(OPTIONS[0], str(tmp_path / "jax"))
    try:
        assert quantize("--bits", "0") == 2
        assert options()[0] == str(tmp_path / "jax")
    finally:
        jax.config.update(OPTIONS[0], before)
    assert not (tmp_path / "user").exists()
