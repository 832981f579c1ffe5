"""Accuracy, agreement, size and speed of models in JAX and in other runtimes, side by side.

The quantized networks and what was measured are kept, so that a run that was interrupted goes on
where it stopped.
"""

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import jax
import numpy as np
import onnx
from measure import device, side_by_side
from onnx_sessions import quantize_static, session

import pretrained
import qjax
from pretrained import datasets
from pretrained.recipes import RECIPES
from qjax import artifact, atomic
from qjax.cli.loading import CALIBRATION_SIZE
from qjax.progress import Progress, progress_bar
from qjax.recipe import Sums
from qjax.table import table

TEST_BATCH = 500
SPEED_SIZE = 64  # images that a network without weights is calibrated on
MEASURED = ("accuracy", "speed")
UNTRAINED = sorted(RECIPES.keys() - set(pretrained.names()))
CLOSE = 1e-5  # logits that are this close count as the same
CALIBRATIONS = ("MinMax", "Percentile", "Entropy")  # of ONNX Runtime's quantize_static
OPENVINO_LAYERS = {"Convolution", "FullyConnected", "MatMul"}
INTEGERS = {"i8", "u8"}

Predict = Callable[[np.ndarray], Any]
Result = dict[str, Any]


class Models(NamedTuple):
    """What is run.

    Attributes:
      model: the pretrained model.
      q: what qjax made of it.
      calibration: the preprocessed images that it was calibrated on.
      floats: the float model in ONNX.
      quantized: the quantized one.
      threads: of the runtimes, 0 for one per core.
      folder: where models are kept.
    """

    model: pretrained.Pretrained
    q: qjax.Quantized
    calibration: np.ndarray
    floats: onnx.ModelProto
    quantized: onnx.ModelProto
    threads: int
    folder: Path


class Row(NamedTuple):
    """A model in a runtime.

    Attributes:
      runtime: its name.
      network: which model, in which form.
      predict: of preprocessed images: the logits.
      size: bytes of the file or the arrays.
      like: what it should compute: float or quantized, as JAX does.
      in_float: how many layers the runtime computes in float; None if it does not tell.
      is_timed: whether its speed is of interest.
    """

    runtime: str
    network: str
    predict: Predict
    size: int
    like: str
    in_float: int | None = None
    is_timed: bool = True


class Runtime(NamedTuple):
    """A runtime.

    Attributes:
      name: its own.
      packages: that it needs.
      extra: of qjax, that installs them.
      rows: of the models: its rows, the float network first.
    """

    name: str
    packages: tuple[str, ...]
    extra: str
    rows: Callable[[Models], Iterator[Row]]

    @property
    def is_installed(self) -> bool:
        """Whether all of its packages are."""
        return all(map(importlib.util.find_spec, self.packages))


# ---- Runtimes


def in_jax(models: Models) -> Iterator[Row]:
    """The float model, fake quantization and integers."""
    model, q = models.model, models.q
    run, floats = qjax.integer(q), jax.jit(model.apply_fn)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    yield Row("JAX", "float", lambda x: floats(model.params, x), size, "float")
    stored = artifact.stored_bytes(q)
    yield Row("JAX", "fake quantization", lambda x: q.apply_fn(q.params, x), stored, "quantized")
    yield Row("JAX", "integers", lambda x: run(q.params, x), stored, "quantized")


def in_onnx_runtime(models: Models) -> Iterator[Row]:
    """The float model, qjax's quantized one, and those of ONNX Runtime's own quantization."""
    own = {name: _quantize_static(models, name) for name in CALIBRATIONS}

    def row(network: str, model: onnx.ModelProto, like: str, **options: Any) -> Row:
        predict, in_float = session(models.threads, model, **options)
        is_optimized = options.get("optimizes", True)
        fields = network, predict, model.ByteSize(), like, in_float if is_optimized else None
        return Row("ONNX Runtime", *fields, is_timed=is_optimized)

    yield row("float", models.floats, "float")
    yield row("qjax, not optimized", models.quantized, "quantized", optimizes=False)
    for precise, kernels in ((True, "exact sums"), (False, "default kernels")):
        yield row(f"qjax, {kernels}", models.quantized, "quantized", precise=precise)
        # Saturation costs them all alike: one shows it.
        for calibration, quantized in list(own.items())[: None if precise else 1]:
            yield row(f"its own, {calibration}, {kernels}", quantized, "float", precise=precise)


def _quantize_static(models: Models, calibration: str) -> onnx.ModelProto:
    """ONNX Runtime's own quantization of the float model, on the same images; kept."""
    kept = models.folder / f"{calibration}.onnx"
    if not kept.exists():
        onnx.save(quantize_static(models.floats, models.calibration, calibration), kept)
    return onnx.load(kept)


def in_litert(models: Models) -> Iterator[Row]:
    """The float model and qjax's quantized one."""
    float_network = models.model.apply_fn, models.model.params
    networks = (("float", float_network, "float"), ("qjax", (models.q,), "quantized"))
    for network, given, like in networks:
        predict = _Interpreted(given, models.threads)
        one = models.calibration[:1]
        size, in_float = len(predict.written(one)), None if like == "float" else predict.floats(one)
        yield Row("LiteRT", network, predict, size, like, in_float)


class _Interpreted:
    """A network in LiteRT; a model takes one number of images, so there is one for each."""

    def __init__(self, network: tuple[Any, ...], threads: int) -> None:
        self._network, self._threads = network, threads
        self._runs: dict[int, tuple[bytes, Any]] = {}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        run = self._made(x)[1].get_signature_runner("serving_default")
        return run(input_0=x)["output_0"]

    def written(self, x: np.ndarray) -> bytes:
        """The model for as many images."""
        return self._made(x)[0]

    def floats(self, x: np.ndarray) -> int:
        """The number of tensors in float that are neither input nor output."""
        tensors = self._made(x)[1].get_tensor_details()
        return sum(tensor["dtype"] == np.float32 for tensor in tensors) - 2

    def _made(self, x: np.ndarray) -> tuple[bytes, Any]:
        from ai_edge_litert.interpreter import Interpreter

        if len(x) not in self._runs:
            model = qjax.to_tflite(*self._network, x)
            # Of no number of threads LiteRT makes one.
            interpreter = Interpreter(model_content=model, num_threads=self._threads or None)
            self._runs[len(x)] = model, interpreter
        return self._runs[len(x)]


def in_openvino(models: Models) -> Iterator[Row]:
    """The float model and qjax's quantized one."""
    import openvino

    core = openvino.Core()
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if models.threads:
        options["INFERENCE_NUM_THREADS"] = models.threads
    networks = (("float", models.floats, "float"), ("qjax", models.quantized, "quantized"))
    for network, model, like in networks:
        read = core.read_model(cast(Any, model.SerializeToString()))
        compiled = core.compile_model(read, "CPU", options)
        infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        layers = (i for i in infos if i["layerType"].astype(str) in OPENVINO_LAYERS)
        in_float = sum(i["runtimePrecision"].astype(str) not in INTEGERS for i in layers)
        predict = lambda x, run=compiled: run(x)[0]  # noqa: E731
        yield Row("OpenVINO", network, predict, model.ByteSize(), like, in_float)


RUNTIMES = (
    Runtime("JAX", ("jax",), "all", in_jax),
    Runtime("ONNX Runtime", ("onnxruntime",), "export", in_onnx_runtime),
    Runtime("LiteRT", ("ai_edge_litert", "litert_converter"), "runtimes", in_litert),
    Runtime("OpenVINO", ("openvino",), "runtimes", in_openvino),
)


# ---- The comparison


def main() -> None:
    """Compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=pretrained.names(),
        metavar="NAME|PATH",
        help=f"(all with weights); for speed alone: {', '.join(UNTRAINED)}",
    )
    add("--bits", type=int, default=8, metavar="N", help="width of all tensors (%(default)s)")
    add("--weight-bits", type=int, metavar="N", help="width of the weights (as --bits)")
    add("--sums", choices=get_args(Sums), default="quantized", help="(%(default)s)")
    names = [runtime.name for runtime in RUNTIMES[1:]]
    add("--runtimes", nargs="+", choices=names, default=names, help="next to JAX (all)")
    add("--batches", nargs="+", type=int, default=[1, 32, 128], metavar="N", help="images per call")
    add("--threads", type=int, default=1, metavar="N", help="0: one per core (%(default)s)")
    add("--seconds", type=float, default=4.0, metavar="S", help="per variant (%(default)s)")
    add("--measure", nargs="+", choices=MEASURED, default=MEASURED, help="(both)")
    add(
        "--out",
        type=Path,
        default=Path("out/runtimes"),
        metavar="DIR",
        help="where networks and measurements are kept; delete what is to be made again "
        "(%(default)s)",
    )
    arguments = parser.parse_args()
    for name in arguments.models:
        label = Path(name).stem
        bits = f"{arguments.bits}-bits"
        if arguments.weight_bits is not None:
            bits += f"-weights-{arguments.weight_bits}"
        folder = arguments.out / f"{label}-{bits}-{arguments.sums}-sums"
        results, test = compare(name, folder, arguments)
        batches = arguments.batches if "speed" in arguments.measure else []
        print(f"{folder.name}\n")
        print(written(results, batches))
        print(f"\n{test}; {device()}\n")
    for runtime in RUNTIMES:
        if runtime.name in arguments.runtimes and not runtime.is_installed:
            print(
                f"{runtime.name} is left out, as it is not installed: "
                f'pip install -e ".[{runtime.extra}]"'
            )


def compare(name: str, folder: Path, arguments: argparse.Namespace) -> tuple[list[Result], str]:
    """Measures what the folder does not hold yet: the results by row, and which images they use."""
    if name in UNTRAINED and "accuracy" in arguments.measure:
        raise SystemExit(
            f"`--models` has {name}, of which there are no weights and no accuracy; pass "
            "--measure speed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    model = untrained(name) if name in UNTRAINED else pretrained.load(name)
    test = datasets.load(model.dataset, "test")
    wanted = (RUNTIMES[0].name, *arguments.runtimes)
    runtimes = [runtime for runtime in RUNTIMES if runtime.name in wanted and runtime.is_installed]
    setting = {"runtimes": [runtime.name for runtime in runtimes]}
    timing = setting | {key: getattr(arguments, key) for key in ("batches", "threads", "seconds")}
    settings = dict(zip(MEASURED, (setting, timing), strict=True))
    ways = (partial(evaluate, test), partial(time, arguments))
    models, rows, results = None, [], []
    for way, (what, setting) in zip(ways, settings.items(), strict=True):
        if what not in arguments.measure:
            continue
        path = folder / f"{what}.json"
        found = read(path, setting)
        if found is None:
            if models is None:
                models = load(model, folder, arguments)
                rows = [row for runtime in runtimes for row in runtime.rows(models)]
            with progress_bar(f"{folder.name}: {what}") as progress:
                found = way(models, rows, progress)
            write(path, setting, found)
        results = [a | b for a, b in zip(results or [{}] * len(found), found, strict=True)]
    return results, f"{len(test.images):,} test images of {test.name}"


def untrained(name: str) -> pretrained.Pretrained:
    """A network of random weights."""
    recipe = RECIPES[name]
    size = datasets.load(recipe.dataset, "train").images.shape[1:]
    params = recipe.model.init(jax.random.key(0), np.zeros((1, *size), np.float32))
    return pretrained.Pretrained(
        name, recipe.model.apply, params, recipe.preprocessing, recipe.dataset, {}
    )


def read(path: Path, setting: dict[str, Any]) -> list[Result] | None:
    """Results that were kept, if they were measured in the same setting."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept["results"] if kept.get("setting") == setting else None


def write(path: Path, setting: dict[str, Any], results: list[Result]) -> None:
    """Keeps results."""
    atomic.write(path, json.dumps({"setting": setting, "results": results}, indent=1) + "\n")


def load(model: pretrained.Pretrained, folder: Path, arguments: argparse.Namespace) -> Models:
    """Quantizes a model, unless the folder holds it, and exports it."""
    images = datasets.load(model.dataset, "train").images
    size = SPEED_SIZE if model.name in UNTRAINED else CALIBRATION_SIZE
    count = min(size, len(images))
    calibration = np.asarray(model.preprocess(datasets.calibration_draw(images, count, 0)))
    if (folder / artifact.MANIFEST).exists():
        q = qjax.load(str(folder), model.apply_fn, model.params)
    else:
        weights = arguments.bits if arguments.weight_bits is None else arguments.weight_bits
        recipe = qjax.recipe(
            arguments.bits, weight_bits=weights, target="onnxruntime", sums=arguments.sums
        )
        if model.name in UNTRAINED:  # whose codes do not matter, but ranges that take in the ReLU
            recipe = dataclasses.replace(recipe.naive(), range_method="output_mse")
        q = qjax.quantize(model.apply_fn, model.params, calibration, recipe, progress=True)
        qjax.save(str(folder), q)
    x = calibration[:1]
    floats = qjax.to_onnx(model.apply_fn, model.params, x)
    return Models(model, q, calibration, floats, qjax.to_onnx(q, x), arguments.threads, folder)


def evaluate(
    test: datasets.Dataset, models: Models, rows: list[Row], progress: Progress
) -> list[Result]:
    """Top-1 and agreement with JAX on all test images."""
    logits: dict[str, np.ndarray] = {}
    results = []
    for done, row in enumerate(rows):
        progress(f"{row.runtime} {row.network}", done, len(rows))
        batches = (
            np.asarray(row.predict(np.asarray(models.model.preprocess(images))))
            for images in np.split(test.images, range(TEST_BATCH, len(test.images), TEST_BATCH))
        )
        found = np.concatenate(list(batches))
        reference = logits.setdefault(row.like, found)  # JAX comes first
        shares = {
            "top1": found.argmax(-1) == test.labels,
            "same_class": found.argmax(-1) == reference.argmax(-1),
            "close": np.abs(found - reference).max(-1) <= CLOSE,
        }
        percent = {key: float(100 * share.mean()) for key, share in shares.items()}
        results.append(_described(row) | percent)
    return results


def time(
    arguments: argparse.Namespace, models: Models, rows: list[Row], progress: Progress
) -> list[Result]:
    """Images per second by row, all rows taking turns, and how many times the float network's."""
    results = [_described(row) for row in rows]
    timed = [index for index, row in enumerate(rows) if row.is_timed]
    floats = {row.runtime: i for i, row in reversed(list(enumerate(rows)))}  # each one's first row
    for done, batch in enumerate(arguments.batches):
        progress(f"{batch} images", done, len(arguments.batches))
        x = np.resize(models.calibration, (batch, *models.calibration.shape[1:]))
        turns = [lambda predict=rows[index].predict, x=x: predict(x) for index in timed]
        times = side_by_side(turns, arguments.seconds)
        for place, index in enumerate(timed):
            base = timed.index(floats[rows[index].runtime])
            results[index] |= {
                f"images_per_second_{batch}": batch / times.median[place],
                f"over_float_{batch}": times.speedup(place, base),
                f"fastest_over_float_{batch}": times.least[base] / times.least[place],
            }
    return results


def _described(row: Row) -> Result:
    return {
        "runtime": row.runtime,
        "network": row.network,
        "like": row.like,
        "bytes": row.size,
        "in_float": row.in_float,
    }


def written(results: list[Result], batches: list[int]) -> str:
    """The results as a table."""
    header = ("runtime", "network", "top-1", "same class", "within 1e-5", "in float", "kB")
    speeds = (f"images/s at {batch} (over float, at best)" for batch in batches)

    def speed(result: Result, batch: int) -> str:
        found = result.get(f"images_per_second_{batch}")
        ratios = (result.get(f"{key}over_float_{batch}") for key in ("", "fastest_"))
        return "" if found is None else "{:,.0f} ({:.2f}, {:.2f})".format(found, *ratios)

    def cells(result: Result) -> tuple[str, ...]:
        keys = ("top1", "same_class", "close")
        shares = (f"{result[key]:.2f}" if key in result else "" for key in keys)
        in_float = "" if result["in_float"] is None else str(result["in_float"])
        sizes = in_float, f"{result['bytes'] / 1e3:,.0f}"
        found = (speed(result, batch) for batch in batches)
        return (result["runtime"], result["network"], *shares, *sizes, *found)

    align = "<<" + ">" * (len(header) + len(batches) - 2)
    return table((*header, *speeds), [cells(result) for result in results], align)


if __name__ == "__main__":
    main()
