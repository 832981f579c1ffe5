"""Two processes of two devices quantize together what one device quantizes alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import host
import numpy as np
import pytest

import qjax

TESTS = Path(__file__).parent


def start(job: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    script = str(TESTS / "host.py")
    return [started([script, str(i), port, job, str(folder)]) for i in range(host.COUNT)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)


def finish(processes: list[subprocess.Popen[bytes]], seconds: float = 240) -> list[str]:
    """What the processes write to standard error, once they have ended well."""
    errors = [process.communicate(timeout=seconds)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * host.COUNT, errors
    return errors


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder where two processes wrote their results, and their messages."""
    folder = tmp_path_factory.mktemp("hosts")
    return folder, finish(start("quantize_all,refuse", folder))


@pytest.mark.parametrize("case", host.CASES)
def test_two_processes_give_the_codes_of_one(together: tuple[Path, list[str]], case: str):
    folder, _ = together
    (apply_fn, params, x), _, options = host.CASES[case]
    q = qjax.quantize(apply_fn, params, x, options["recipe"])
    found = [np.load(folder / f"{case} {process}.npz") for process in range(host.COUNT)]
    for name, layer in q.params["layers"].items():
        assert np.mean(found[0][name] == np.asarray(layer.kernel)) >= 0.9999
        np.testing.assert_array_equal(found[0][name], found[1][name])
    np.testing.assert_array_equal(found[0]["logits"], found[1]["logits"])
    np.testing.assert_allclose(found[0]["logits"], q.apply_fn(q.params, x), atol=1e-3)


def test_the_first_process_alone_saves(together: tuple[Path, list[str]]):
    folder, _ = together
    for case, ((apply_fn, _, x), _, _) in host.CASES.items():
        loaded = qjax.load(folder / f"{case} of 0", apply_fn)
        logits = np.load(folder / f"{case} 0.npz")["logits"]
        np.testing.assert_allclose(loaded.apply_fn(loaded.params, x), logits, atol=1e-5)
    assert not [entry for entry in os.listdir(folder) if entry.endswith("of 1")]


def test_devices_that_share_no_batch_are_told(together: tuple[Path, list[str]]):
    _, [errors, _] = together
    assert "2 of 4 devices are used: batches of 26 images do not divide among more" in errors
    assert "the work of one of 4 devices are used: batches of 25 images do not divide" in errors


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("nan", ["process 1 of 2 stopped; its own error says why", "`batches` must be finite"]),
        ("shape", 2 * ["`batches` must have images of the same shape and type in every process"]),
        ("mesh", 2 * ["as many devices of each of them; got 2 of process 0, 1 of process 1"]),
        ("end", 2 * ["`end_search` looks at the whole network in one process"]),
    ],
)
def test_what_is_refused_is_refused_in_all_processes(together: Any, name: str, messages: list[str]):
    folder, _ = together
    for process, message in enumerate(messages):
        assert message in (folder / f"{name} {process}.txt").read_text()


def test_a_killed_process_ends_the_other_and_the_run_goes_on(tmp_path: Path):
    processes = start("stop_at_c", tmp_path)
    end = time.monotonic() + 120
    while not (tmp_path / "reached").exists() and time.monotonic() < end:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    (tmp_path / "killed").touch()
    _, error = processes[0].communicate(timeout=40)  # its heartbeat's timeout is 10 seconds
    assert processes[0].returncode != 0 and error
    finish(start("go_on", tmp_path))
    fitted = [np.load(tmp_path / f"resumed {process}.npz") for process in range(host.COUNT)]
    assert fitted[0]["fitted"].tolist() == ["c", "d", ""] and not fitted[1]["fitted"].size
    (apply_fn, params, x), _, options = host.CASES["dense 8"]
    q = qjax.quantize(apply_fn, params, x, options["recipe"])
    for name, layer in q.params["layers"].items():
        for found in fitted:
            np.testing.assert_array_equal(found[name], np.asarray(layer.kernel))


def test_the_command_line_quantizes_in_two_processes(tmp_path: Path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (32, 4, 4, 1), np.uint8)
    names = {"x_train": images, "x_test": images, "y_train": np.arange(32) % 10}
    np.savez(tmp_path / "images.npz", **names, y_test=names["y_train"])
    common = ["-m", "qjax", "quantize", "--model", "host:make", "--no-compilation-cache"]
    common += ["--dataset", str(tmp_path / "images.npz"), "--range-method", "absmax"]
    port, meet = free_port(), []
    for process in range(host.COUNT):
        own = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(process)]
        meet.append(started([*common, *own, "--out", str(tmp_path / "together")]))
    alone = started([*common, "--out", str(tmp_path / "alone")])
    outputs = [each.communicate(timeout=240) for each in (*meet, alone)]
    assert [each.returncode for each in (*meet, alone)] == [0, 0, 0], outputs
    assert b"saved" in outputs[0][0] and b"saved" not in outputs[1][0]
    together, expected = (
        qjax.load(tmp_path / name, host.make()[0]) for name in ("together", "alone")
    )
    kernels = [q.params["layers"]["head"].kernel for q in (together, expected)]
    np.testing.assert_array_equal(*kernels)
