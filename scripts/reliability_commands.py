"""Cases of `reliability.py`: command lines at random, files that commands read, and signals."""

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reliability_artifacts import Case, edit, edit_arrays, edit_bytes
from safetensors.numpy import save as save_arrays

import qjax
from qjax import progress
from qjax.cli.main import main

IMAGES = ("--dataset", "images.npz")
CHEAP = ("--range-method", "absmax", "--rounding", "nearest", "--sweeps", "0")
EXIT_CODES = {0: "", 2: "qjax: error: ", 130: "qjax: interrupted", 143: "qjax: terminated"}


def tiny() -> tuple[Callable[..., Any], Any]:
    """A network of two layers, for `--model`."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (48, 8), "head": (8, 10)}
    return apply_tiny, {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }


def apply_tiny(params: Any, x: jax.Array) -> jax.Array:
    """That network."""
    return jax.nn.relu(x.reshape(len(x), -1) @ params["hidden"]) @ params["head"]


MODEL = f"{__name__}:{tiny.__name__}"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder with images, which is the current one while the context is open."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        arrays = {}
        for split in ("train", "test"):
            arrays[f"x_{split}"] = rng.integers(0, 255, (20, 4, 4, 3), np.uint8)
            arrays[f"y_{split}"] = rng.integers(0, 10, 20)
        _write_npz(Path(IMAGES[1]), arrays)
        yield Path(name)


def _write_npz(file: Path, arrays: dict[str, Any]) -> None:
    np.savez(file, **arrays)


def _judged(argv: Sequence[str], mentions: str = "") -> Case:
    """Runs a command line: it must end well, or with one line that says why."""
    out, err = io.StringIO(), io.StringIO()
    progress.PERIOD = math.inf  # no lines of progress
    before = set(Path().rglob("*"))
    said = f"`qjax {' '.join(argv)}`"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = main(argv)
    except SystemExit as stop:  # --help
        code = stop.code
    except BaseException:
        return Case(failure=f"{said} raised {traceback.format_exc()[-600:]}")
    line = err.getvalue()
    if code == 0:
        return Case()
    left = sorted(str(path) for path in set(Path().rglob("*")) - before)
    if code != 2 or not line.startswith(EXIT_CODES[2]) or line.count("\n") != 1:
        return Case(failure=f"{said} ended with {code} and {line!r:.600}")
    if left:
        return Case(failure=f"{said} was refused and left {left}")
    if mentions not in line:
        return Case(failure=f"{said} does not name {mentions}: {line}")
    return Case(was_refused=True)


# ---- Options

NUMBERS = ("-1", "0", "1", "2", "4", "8", "16", "17", "3.5", "1e3", "nan", "float", "9" * 30)
WORDS = ("", "x", "None", "*", "[", "é", "\x1b[31m", "a=b", "hidden=4", "*=float", "=", "x" * 300)
PATHS = ("/dev/full", "/dev/null", "/nowhere/file", ".", "..", "\0", "out", "out/file", IMAGES[1])
CHOICES = ("absmax", "mse", "nearest", "dynamic", "per_channel", "tensorrt", "quantized", "nf4")
GOOD = dict.fromkeys(
    (*("--bits", "--weight-bits", "--input-bits", "--output-bits", "--first-last-bits"),),
    ("8", "4", "3"),
) | {
    **dict.fromkeys(("--sweeps", "--reconstructions", "--seed"), ("0", "1", "3")),
    **dict.fromkeys(("--out", "--report", "--export", "--checkpoint"), ("out", "out.onnx")),
    "--range-method": ("absmax", "mse", "output_mse"),
    "--rounding": ("nearest", "gptq"),
    "--activation-ranges": ("dynamic",),
    "--sums": ("quantized",),
    "--target": ("onnxruntime", "tensorrt"),
    "--weight-format": ("nf4", "kmeans", "power_of_two"),
    "--override": ("hidden=4", "*=float", "h*=3"),
    "--calibration-size": ("1", "20"),
    "--cost": ("bits", "picojoules"),
}
VALUES = (*NUMBERS, *WORDS, *PATHS, *CHOICES)
COMMANDS = ("quantize", "trace", "explain", "accumulators", "export")


def random_options(count: int, seed: int) -> Iterator[Case]:
    """Runs commands with options and values at random."""
    rng = random.Random(seed)
    known = {command: _options(command) for command in COMMANDS}
    with _folder() as folder:
        files = sorted(folder.iterdir())
        for number in range(count):
            command = rng.choice(COMMANDS)
            argv = [command, "--model", MODEL, *IMAGES]
            argv += CHEAP if command != "trace" else ()
            for _ in range(rng.randint(1, 3)):
                argv += _option(rng, *rng.choice(known[command]))
            yield _numbered(number, _judged(argv))
            for path in sorted(set(folder.rglob("*")) - set(files), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()


def _options(command: str) -> list[tuple[str, bool]]:
    """The options of a command: (name, whether it takes a value), read from its help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    lines = [line.split() for line in text.getvalue().splitlines() if line.startswith("  --")]
    return [(words[0], len(words) > 1 and words[1].isupper()) for words in lines]


def _option(rng: random.Random, name: str, takes_value: bool) -> list[str]:
    if rng.random() < 0.05:  # one that does not exist
        name = "--" + "".join(rng.choices(string.ascii_lowercase, k=6))
    has_value = takes_value != (rng.random() < 0.02)
    value = GOOD.get(name) if rng.random() < 0.7 else None
    return [name, rng.choice(value or VALUES)] if has_value else [name]


def _numbered(number: int, case: Case) -> Case:
    return case._replace(failure=case.failure and f"case {number}: {case.failure}")


# ---- Files


def damaged_recipes(count: int, seed: int) -> Iterator[Case]:
    """Quantizes by recipes with changed entries."""
    rng = random.Random(seed)
    entries = qjax.recipe(8, overrides={"head": {"weight_bits": 4}}).naive().to_json()
    whole = json.dumps({"recipe": entries})
    with _folder():
        for number in range(count):
            file = Path("recipe.json")
            if rng.random() < 0.2:
                file.write_bytes(edit_bytes(whole.encode(), rng))
            else:
                entries = json.loads(whole)
                edit(entries, rng)
                file.write_text(json.dumps(entries))
            argv = ["quantize", "--model", MODEL, *IMAGES, "--recipe", str(file)]
            yield _numbered(number, _judged(argv))


def damaged_images(count: int, seed: int) -> Iterator[Case]:
    """Quantizes on datasets with damaged files."""
    rng = random.Random(seed)
    with _folder():
        whole = Path(IMAGES[1]).read_bytes()
        for number in range(count):
            file = Path("damaged.npz")
            if rng.random() < 0.5:
                file.write_bytes(edit_bytes(whole, rng))
            else:
                with np.load(IMAGES[1]) as found:
                    arrays = dict(found)
                edit_arrays(arrays, rng)
                _write_npz(file, arrays)
            argv = ["quantize", "--model", MODEL, "--dataset", str(file), *CHEAP]
            yield _numbered(number, _judged(argv, str(file)))


def damaged_weights(count: int, seed: int) -> Iterator[Case]:
    """Reads weights of a ResNet, under the names that PyTorch has, from damaged files."""
    rng = random.Random(seed)
    file = Path("resnet.safetensors")
    with _folder():
        for number in range(count):
            arrays = _resnet()
            if rng.random() < 0.5:
                file.write_bytes(edit_bytes(save_arrays(arrays), rng))
            else:
                edit_arrays(arrays, rng)
                file.write_bytes(save_arrays(arrays))
            yield _numbered(number, _judged(["trace", "--model", str(file), *IMAGES], str(file)))


def _resnet() -> dict[str, np.ndarray]:
    """Weights of a ResNet-8 with two channels."""
    rng, arrays = np.random.default_rng(0), {}
    blocks = [f"layer{stage}.0." for stage in (1, 2, 3)]
    convolutions = [("conv1", 3, 2)]
    for block, inputs, channels in zip(blocks, (2, 2, 4), (2, 4, 8), strict=True):
        convolutions += [(f"{block}conv1", inputs, channels), (f"{block}conv2", channels, channels)]
    for name, inputs, channels in convolutions:
        arrays[f"{name}.weight"] = rng.normal(size=(channels, inputs, 3, 3)).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            norm = name.replace("conv", "bn")
            arrays[f"{norm}.{part}"] = rng.uniform(0.5, 2, channels).astype(np.float32)
    arrays["fc.weight"] = rng.normal(size=(10, 8)).astype(np.float32)
    arrays["fc.bias"] = np.zeros(10, np.float32)
    return arrays


# ---- Signals


def signals(count: int, seed: int) -> Iterator[Case]:
    """Ends `qjax quantize` by Ctrl-C or SIGTERM at random instants."""
    rng = random.Random(seed)
    code = (
        "import sys; from qjax.cli.main import main; print('ready', flush=True); sys.exit(main())"
    )
    with _folder() as folder:
        argv = ["quantize", "--model", MODEL, *IMAGES, "--out", "out"]
        command = [sys.executable, "-c", code, *argv, "--no-compilation-cache", "--quiet"]
        script = Path(__file__).parent
        for number in range(count):
            kind = rng.choice((signal.SIGINT, signal.SIGTERM))
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": f"{script}:{os.environ.get('PYTHONPATH', '')}"},
            )
            assert process.stdout is not None
            process.stdout.readline()  # signals are handled once all is imported
            time.sleep(rng.uniform(0.2, 6))
            process.send_signal(kind)
            _, line = process.communicate()
            yield _numbered(number, _ended(process.returncode, line, 128 + kind, folder))
            shutil.rmtree("out", ignore_errors=True)


def _ended(code: int, line: str, expected: int, folder: Path) -> Case:
    names = {path.name for path in folder.iterdir()}
    if code in (0, 128 - expected) and "out" in names:  # it had ended, or all but ended
        qjax.load(folder / "out", apply_tiny)
        return Case()
    is_told = line == f"{EXIT_CODES[expected]}\n"
    if code == expected and is_told and names <= {IMAGES[1], "out"}:
        return Case(was_refused=True)
    return Case(failure=f"ended with {code}, {line!r:.300}, left {sorted(names)}")
