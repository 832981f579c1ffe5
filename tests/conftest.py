"""Strict JAX for every test: no silent dtype or rank promotion; four CPU devices for sharding.

Most of the time goes into compiling for little data, so XLA optimizes nothing, and what one worker
compiles the other one reads from a folder that lasts as long as the run. Tests that compare the
bits of networks, or run much data, compile as users do: see the fixture `optimized`.

The report page is checked in a headless Chromium with `--browser`. No package index has one, so
without the option that check is left out, and the end of the run says so; with it, it fails where
there is no Chromium.
"""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest

from qjax import programs

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event, once a program
_PROGRAMS = "QJAX_TEST_PROGRAMS"  # names the folder to the workers
_MAPS = Path("/proc/self/maps")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)

_LEVEL, _SPLIT = "xla_backend_optimization_level", "xla_cpu_parallel_codegen_split_count"
_OPTIMIZED = {_LEVEL: 3, "xla_cpu_use_fusion_emitters": True}
_OPTIMIZED_FITS = {_LEVEL: 2}
_UNOPTIMIZED = (f"--{_LEVEL}=0", "--xla_cpu_use_fusion_emitters=false", f"--{_SPLIT}=1")
_LEAST_SECONDS = 0.1  # to compile a program, for its way through the folder to pay

# The first example of a property compiles and the others do not, so no example has a deadline.
# The same examples every run: what fails here fails everywhere.
hypothesis.settings.register_profile("qjax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("qjax")


def pytest_configure(config: pytest.Config) -> None:
    """Has XLA optimize nothing; keeps programs and Keras's settings in a folder of this run."""
    if not hasattr(config, "workerinput"):
        os.environ[_PROGRAMS] = tempfile.mkdtemp(prefix="qjax-tests-")
        _set_flags()
    programs.FAST_TO_COMPILE.update({_LEVEL: 0, _SPLIT: 1})  # a worker has a core
    os.environ.update(KERAS_BACKEND="jax", KERAS_HOME=os.environ[_PROGRAMS])
    jax.config.update("jax_compilation_cache_dir", os.environ[_PROGRAMS])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _set_flags() -> None:
    """Adds the flags that XLA knows to those of the user: it ends a process that has another."""
    given = os.environ.get("XLA_FLAGS", "")
    known = _UNOPTIMIZED
    if not _starts(" ".join([given, *known])):
        if not _starts(given):
            pytest.exit(f"this XLA does not take XLA_FLAGS={given!r}", returncode=3)
        known = [flag for flag in _UNOPTIMIZED if _starts(f"{given} {flag}")]
    os.environ["XLA_FLAGS"] = " ".join([given, *known])


def _starts(flags: str) -> bool:
    probe = [sys.executable, "-c", "import jax; jax.numpy.zeros(1) + 1"]
    environment = os.environ | {"XLA_FLAGS": flags}
    return not subprocess.run(probe, env=environment, capture_output=True, check=False).returncode


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes that folder."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(_PROGRAMS), ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--browser`."""
    parser.addoption("--browser", action="store_true", help="check the report page in Chromium")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the checks that need a browser, unless they were asked for."""
    if config.getoption("--browser"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Says what was not run."""
    if not config.getoption("--browser"):
        terminalreporter.write_line(
            "not run: the checks of the report page in a browser; "
            "with Chromium installed, python -m pytest --browser runs them"
        )


@pytest.fixture(autouse=True, scope="module")  # the maps are thousands of lines to read
def room_for_programs() -> Iterator[None]:
    """Lets go of compiled programs before the process has all the memory maps that it may have.

    Hundreds of networks are compiled in one process here; a program takes some ten maps of 65,530.
    Until then the garbage collector need not look at what the modules before have left.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 48_000:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    gc.freeze()


@pytest.fixture
def programs_compiled() -> Iterator[list[str]]:
    """The thread that compiled each program, by name, in a test that begins with none compiled.

    JAX holds a few thousand programs: with those of the tests before, it may let go of one that
    is counted.
    """
    found: list[str] = []

    def note(event: str, _seconds: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(threading.current_thread().name)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compiles networks, and what fits them, as users do: the options that do it."""
    for options, own in (
        (programs.FAST_TO_RUN, _OPTIMIZED),
        (programs.FAST_TO_COMPILE, _OPTIMIZED_FITS),
    ):
        for option, value in own.items():
            monkeypatch.setitem(options, option, value)
    return dict(programs.known(tuple(_OPTIMIZED.items())))


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """Four CPU devices along one axis, `data`."""
    return jax.make_mesh((4,), ("data",), devices=jax.devices("cpu"))
