"""Cases of `reliability.py`: artifacts that are replaced or damaged, runs that are killed."""

import copy
import hashlib
import importlib.util
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

import qjax
from qjax import directory, kept_arrays
from qjax.directory import Files

CASES = "cases.jsonl"  # of the process that Atheris ends
WIDTHS = {"a": 3, "b": 5}  # of the weights of two artifacts


class Case(NamedTuple):
    """What came of one case.

    Attributes:
      was_refused: by an error that names the file; otherwise it was survived.
      failure: why it was neither, empty if it was.
    """

    was_refused: bool = False
    failure: str = ""


def network(params: Any, x: jax.Array) -> jax.Array:
    """A small network whose artifact takes some time to write."""
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["head"]


def quantized(bits: int) -> qjax.Quantized:
    """The network, quantized in the fastest way."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (64, 512), "bias": (1, 512), "head": (512, 64)}
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    recipe = qjax.recipe(8, weight_bits=bits).naive()
    return qjax.quantize(network, params, jnp.float32(rng.normal(size=(8, 64))), recipe)


# ---- Saving


def killed_saves(count: int, seed: int, loads: int = 100) -> Iterator[Case]:
    """Kills a process that replaces one artifact by another, and loads all the while.

    Args:
      count: of kills.
      seed: of their instants.
      loads: before each.
    """
    instants = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        known = {name: quantized(bits) for name, bits in WIDTHS.items()}
        for name, q in known.items():
            qjax.save(Path(folder, name), q)
        target = Path(folder, "target")
        for _ in range(count):
            with _saving(folder) as saver:
                try:
                    for _ in range(loads):
                        yield _loaded(target, known)
                    time.sleep(instants.uniform(0, 0.05))
                finally:
                    saver.kill()
            yield _loaded(target, known)
        qjax.save(target, known["a"])
        left = sorted(entry.name for entry in (*target.iterdir(), *target.parent.iterdir()))
        yield Case(failure="" if len(left) == 5 else f"saves left {left}")


def _saving(folder: str) -> subprocess.Popen:
    """A process that saves for ever, once it has begun."""
    return _process("save", folder)


def _process(role: str, folder: str) -> subprocess.Popen:
    """A process of this script that does one of `ROLES`, once it says that it has begun."""
    script = Path(__file__).with_name("reliability.py")
    command = [sys.executable, script, "--role", role, folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def save_for_ever(folder: str) -> None:
    """What the process does."""
    known = [qjax.load(Path(folder, name), network) for name in WIDTHS]
    for round, q in enumerate(itertools.cycle(known)):
        qjax.save(Path(folder, "target"), q)
        if round == 0:
            print("saving", flush=True)


def _loaded(path: Path, known: dict[str, qjax.Quantized]) -> Case:
    """Loads an artifact, which must be one of those that are known."""
    try:
        leaves = jax.tree.leaves(qjax.load(path, network).params)
    except Exception as error:
        return Case(failure=f"a load failed: {error!r}")
    for q in known.values():
        others = jax.tree.leaves(q.params)
        if all(np.array_equal(a, b) for a, b in zip(leaves, others, strict=True)):
            return Case()
    return Case(failure="what was loaded is neither the older artifact nor the newer one")


# ---- Quantizing


def killed_runs(count: int, seed: int) -> Iterator[Case]:
    """Kills a process that quantizes with a checkpoint, and goes on in this one."""
    instants = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = _files(Path(folder, "whole"), mixed())
        for number in range(count):
            kept = Path(folder, f"kept{number}")
            with _process("quantize", str(kept)) as process:
                time.sleep(instants.uniform(0, 6))
                process.kill()
            try:
                is_same = _files(Path(folder, f"end{number}"), mixed(kept)) == whole
            except Exception as error:
                yield Case(failure=f"going on raised {error!r}")
                continue
            yield Case(failure="" if is_same else "another result than that of a whole run")


def quantize_once(folder: str) -> None:
    """What the process does: every layer is written."""
    kept_arrays.PAUSE = 0
    print("quantizing", flush=True)
    mixed(Path(folder))


def _files(path: Path, q: qjax.Quantized) -> dict[str, bytes]:
    qjax.save(path, q)
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ---- Damage that hashes do not tell


def mixed_network(params: Any, x: jax.Array) -> jax.Array:
    """Layers of several formats, a sum, and a parameter that is of no layer."""
    x = jax.nn.relu(x @ params["hidden"]) * params["gain"]
    return (x + x @ params["middle"]) @ params["head"]


def mixed(kept: Path | None = None) -> qjax.Quantized:
    """That network, quantized in the fastest way."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (6, 5), "gain": (1, 5), "middle": (5, 5), "head": (5, 4)}
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    formats = {
        "hidden": {"weight_format": "kmeans", "weight_bits": 3, "outputs": None},
        "middle": {"weight_format": "power_of_two", "weight_bits": 4},
        "head": {"weight_bits": 3, "output_bits": 5},
    }
    recipe = qjax.recipe(8, sums="quantized", overrides=formats).naive()
    return qjax.quantize(mixed_network, params, IMAGES, recipe, checkpoint=kept)


IMAGES = jnp.float32(np.random.default_rng(1).normal(size=(8, 6)))

# What an entry of a manifest may become.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 17, 10**9, 2**31, 2**63, 10**30, 0.5, -1e300, math.nan),
    *("", "x", "float32", "int8", "object", "../..", "kmeans", [], {}, [0], [1, 16, 10**9]),
    *([[[]]], {"format": "binary", "limits": [-1, 1]}, {"dict": []}, {"list": [0]}),
)


def damaged_manifests(count: int, seed: int) -> Iterator[Case]:
    """Changes entries of a manifest, and puts its hash right."""

    def change(files: Files, rng: random.Random) -> None:
        entries = files.entries
        for _ in range(rng.choice((1, 1, 1, 2))):
            edit(entries, rng)
        text = json.dumps(entries)
        if rng.random() < 0.01:
            text = text.replace(": [", f": {'[' * 10**5}", 1)
        rewrite(files, text, files.data)

    return _damaged(change, count, seed)


def guided_manifests(count: int, seed: int) -> Iterator[Case]:
    """Changes entries of a manifest so that code is reached which no case before has reached.

    Args:
      count: of cases.
      seed: of the changes.

    Raises:
      RuntimeError: Atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        raise RuntimeError("The group guided needs Atheris: pip install atheris (Linux on x86-64).")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("reliability_guided.py")
        command = [sys.executable, script, folder, str(count), str(seed)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        cases = Path(folder, CASES)
        for line in cases.read_text().splitlines() if cases.exists() else ():
            yield Case(*json.loads(line))
        if process.returncode:
            reason = f"{process.stdout[-1000:]}{process.stderr[-1000:]}"
            yield Case(failure=f"the process ended with {process.returncode}: {reason}")


def damaged_arrays(count: int, seed: int) -> Iterator[Case]:
    """Changes arrays, or the bytes of their file, and puts both hashes right."""

    def change(files: Files, rng: random.Random) -> None:
        data = files.data
        if rng.random() < 0.3:
            data = edit_bytes(data, rng)
        else:
            arrays = load_arrays(data)
            edit_arrays(arrays, rng)
            data = save_arrays(arrays)
        rewrite(files, json.dumps(files.entries), data)

    return _damaged(change, count, seed)


def _damaged(
    change: Callable[[Files, random.Random], None], count: int, seed: int
) -> Iterator[Case]:
    rng = random.Random(seed)
    q = mixed()
    with tempfile.TemporaryDirectory() as folder:
        saved, target = Path(folder, "saved"), Path(folder, "target")
        qjax.save(saved, q)
        for number in range(count):
            shutil.copytree(saved, target)
            change(directory.read(target), rng)
            case = judged(target, Path(folder, "again"))
            yield case._replace(failure=case.failure and f"case {number}: {case.failure}")
            shutil.rmtree(target)


def judged(target: Path, again: Path) -> Case:
    """Loads an artifact: it must be refused, or be of use and be saved as it was read."""
    try:
        q = qjax.load(target, mixed_network)
    except ValueError as error:
        is_clear = str(target) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return Case(was_refused=True, failure="" if is_clear else f"unclear: {error}")
    except Exception as error:
        return Case(failure=f"a load raised {error!r}")
    try:
        logits = np.asarray(q.apply_fn(q.params, IMAGES))
        assert np.all(np.isfinite(logits)) and logits.shape == (8, 4), "logits"
        assert str(q.report), "report"
        qjax.save(again, q)
        known, found = directory.read(target).entries, directory.read(again).entries
        told = {"versions": 0, "environment": 0}  # of who saved it
        assert known | told == found | told, "entries"
        known, found = (
            jax.tree.leaves(q.params),
            jax.tree.leaves(qjax.load(again, mixed_network).params),
        )
        assert all(np.array_equal(a, b) for a, b in zip(known, found, strict=True)), "arrays"
    except Exception as error:
        return Case(failure=f"accepted, but {error!r:.300}")
    return Case()


def rewrite(files: Files, text: str, data: bytes) -> None:
    """Writes changed files with the hashes that belong to them."""
    digest = hashlib.sha256(data).hexdigest()
    name = directory.ARRAYS.format(digest[:16])
    try:
        own = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()
    except RecursionError:
        own = ""
    files.arrays.unlink()
    files.arrays.with_name(name).write_bytes(data)
    hashes = json.dumps({name: digest, directory.MANIFEST: own})
    files.manifest.write_text(f'{text[:-1]}, "sha256": {hashes}}}')


def edit(entries: Any, rng: random.Random) -> None:
    """Changes one entry somewhere in nested lists and dicts."""
    places = list(_places(entries))
    container, key = rng.choice(places)
    value = container[key]
    changes: list[Callable[[], Any]] = [
        lambda: container.pop(key),
        lambda: container.__setitem__(key, copy.deepcopy(rng.choice(VALUES))),
        lambda: container.__setitem__(key, copy.deepcopy(rng.choice(places)[0])),
    ]
    if isinstance(container, dict):
        changes.append(lambda: container.__setitem__(f"{key}x", container.pop(key)))
    else:
        changes += [lambda: container.insert(key, value), lambda: container.reverse()]
    if isinstance(value, int | float) and not isinstance(value, bool):
        numbers = (value + 1, value - 1, -value, 2 * value, value * 10**9, str(value))
        changes += [lambda: container.__setitem__(key, rng.choice(numbers))] * 3
    rng.choice(changes)()


def _places(entries: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) of nested lists and dicts."""
    items = entries.items() if isinstance(entries, dict) else enumerate(entries)
    for key, value in items:
        yield entries, key
        if isinstance(value, dict | list):
            yield from _places(value)


NUMBERS = (math.nan, math.inf, -math.inf, 0, -1, 1e-45, 1e38, 255, -128, 2**31 - 1)


def edit_arrays(arrays: dict[str, np.ndarray], rng: random.Random) -> None:
    """Changes one array."""
    name, other = rng.choice(sorted(arrays)), rng.choice(sorted(arrays))
    array = arrays[name].copy()
    flat = array.reshape(-1)

    def number() -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = np.array(rng.choice(NUMBERS)).astype(array.dtype)
        flat[rng.randrange(flat.size)] = value
        arrays[name] = array

    def bits() -> None:
        view = flat.view(np.uint8)
        view[rng.randrange(view.size)] ^= 1 << rng.randrange(8)
        arrays[name] = array

    changes = (
        *(number, number, bits, bits),
        lambda: arrays.pop(name),
        lambda: arrays.__setitem__(f"{name}x", arrays.pop(name)),
        lambda: arrays.__setitem__(name, arrays[other]),
        lambda: arrays.__setitem__(name, array.astype(rng.choice(("int8", "float64", "uint8")))),
        lambda: arrays.__setitem__(name, flat[:-1]),
        lambda: arrays.__setitem__(name, np.concatenate([flat, flat])),
        lambda: arrays.__setitem__(name, array[None]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        rng.choice(changes)()


def edit_bytes(data: bytes, rng: random.Random) -> bytes:
    """Changes a few bytes, or cuts them off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(rng.choice((8, 200, len(data))))] = rng.randrange(256)
    return bytes(changed) if rng.random() < 0.8 else data[: rng.randrange(len(data))]


ROLES = {"save": save_for_ever, "quantize": quantize_once}  # of processes that are killed
