"""A run that is killed goes on where it was, and ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.fit import checkpoint

LAYERS = ("a", "b", "c", "d")


def network(params: Any, x: jax.Array) -> jax.Array:
    """A residual sum, and values of params alone and of the input that are read late."""
    gain = jnp.exp(params["gain"])
    x = jax.nn.relu(x @ params["a"]) * gain
    y = jax.nn.relu(x @ params["b"])
    x = jax.nn.relu(x + y @ params["c"])
    return (x * gain) @ params["d"]


def make_params() -> Any:
    rng = np.random.default_rng(0)
    return {
        "gain": jnp.float32(rng.normal(size=(1, 6))),
        **{name: jnp.float32(rng.normal(size=(6, 6))) for name in LAYERS},
    }


IMAGES = np.float32(np.random.default_rng(1).normal(size=(24, 6)))
# All that is kept between layers: grids, sums, outputs before and after activations.
RECIPE = qjax.recipe(
    4,
    sums="quantized",
    output_position="both",
    range_method="mse",
    rounding="nearest",
    reconstructions=0,
    sweeps=0,
    overrides={"b": {"weight_format": "kmeans", "weight_bits": 3}},
)


def run(folder: Path | None, progress: Any = False, **changes: Any) -> qjax.Quantized:
    given: dict[str, Any] = {"params": make_params(), "batches": IMAGES, "recipe": RECIPE}
    return qjax.quantize(network, **given | changes, progress=progress, checkpoint=folder)


def saved(path: Path, q: qjax.Quantized) -> dict[str, bytes]:
    qjax.save(path, q)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a run that nobody interrupts."""
    return saved(tmp_path_factory.mktemp("whole") / "artifact", run(None))


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_a_run_that_is_stopped_goes_on(tmp_path: Path, monkeypatch, whole, layer: str):
    monkeypatch.setattr("qjax.kept_arrays.PAUSE", 0)

    def stop(name: str, done: int, total: int) -> None:
        if name == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "kept", stop)
    fitted = []
    q = run(tmp_path / "kept", lambda name, done, total: fitted.append((name, done)))
    start = LAYERS.index(layer)
    assert fitted == [*((n, start + i) for i, n in enumerate(LAYERS[start:])), ("", 4)]
    assert saved(tmp_path / "artifact", q) == whole
    assert saved(tmp_path / "artifact", run(tmp_path / "kept")) == whole  # what is finished stays
    assert os.listdir(tmp_path / "kept") == [checkpoint.FILE]


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from fit import test_checkpoint
from qjax import kept_arrays
kept_arrays.PAUSE = 0
def kill(name, done, total):
    if name == "c":
        os.kill(os.getpid(), signal.SIGKILL)
test_checkpoint.run({folder!r}, kill)
"""


def test_a_process_that_is_killed_goes_on(tmp_path: Path, whole: dict[str, bytes]):
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    code = KILLED.format(paths=paths, folder=str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / f".{'0' * 32}.qjax").touch()
    process = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    fitted = []
    q = run(tmp_path / "kept", lambda name, done, total: fitted.append(name))
    assert fitted == ["c", "d", ""]
    assert saved(tmp_path / "artifact", q) == whole


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batches": IMAGES + 1}, "different images"),
        ({"params": {**make_params(), "a": make_params()["b"]}}, "different params"),
        ({"recipe": qjax.recipe(8)}, "different recipe"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: Any, match: str):
    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if name == "b":
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, stop)
    with pytest.raises(ValueError, match=f"`checkpoint` .* is of another run: {match}. Name ano"):
        run(tmp_path, **changes)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    file = tmp_path / checkpoint.FILE
    run(tmp_path)
    data = file.read_bytes()
    for damaged in (b"", data[:100], data[:-3], data[:-3] + b"abc"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"`checkpoint` .* is damaged.*; remove it to start"):
            run(tmp_path)


def test_where_there_can_be_no_checkpoint(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`checkpoint` must be a folder; .* is a file"):
        run(tmp_path / "file")
    shape = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    with pytest.raises(ValueError, match="`checkpoint` keeps .* on images, and `batches` has none"):
        run(tmp_path, batches=shape)
