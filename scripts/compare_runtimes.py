"""Accuracy, agreement, size and speed of a model in JAX and in other runtimes, side by side."""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from measure import device, side_by_side

import pretrained
import qjax
from pretrained import datasets
from qjax import artifact
from qjax.cli.loading import CALIBRATION_SIZE
from qjax.progress import progress_bar
from qjax.table import table

TEST_BATCH = 500
CLOSE = 1e-5  # logits that are this close count as the same
CALIBRATIONS = ("MinMax", "Percentile", "Entropy")  # of ONNX Runtime's quantize_static

Predict = Callable[[np.ndarray], Any]


class Models(NamedTuple):
    """What is run.

    Attributes:
      model: the pretrained model.
      q: what qjax made of it.
      calibration: the preprocessed images that it was calibrated on.
      floats: the float model in ONNX.
      quantized: the quantized one.
      threads: of ONNX Runtime, 0 for one per core.
    """

    model: pretrained.Pretrained
    q: qjax.Quantized
    calibration: np.ndarray
    floats: onnx.ModelProto
    quantized: onnx.ModelProto
    threads: int


class Row(NamedTuple):
    """A model in a runtime.

    Attributes:
      runtime: its name.
      network: which model, in which form.
      predict: of preprocessed images: the logits.
      size: bytes of the file or the arrays.
      like: what it should compute: float or quantized, as JAX does.
      is_timed: whether its speed is of interest.
    """

    runtime: str
    network: str
    predict: Predict
    size: int
    like: str
    is_timed: bool = True


class Runtime(NamedTuple):
    """A runtime.

    Attributes:
      package: that it needs.
      rows: of the models: its rows.
    """

    package: str
    rows: Callable[[Models], Iterator[Row]]


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
    name, size = "ONNX Runtime", models.quantized.ByteSize()
    session = partial(_session, models.threads)
    yield Row(name, "float", session(models.floats), models.floats.ByteSize(), "float")
    as_written = session(models.quantized, optimizes=False)
    yield Row(name, "qjax, as written", as_written, size, "quantized", is_timed=False)
    for precise, kernels in ((True, "exact sums"), (False, "default")):
        predict = session(models.quantized, precise=precise)
        yield Row(name, f"qjax, {kernels}", predict, size, "quantized")
        # Saturation costs them all alike: one shows it.
        for calibration, quantized in list(own.items())[: None if precise else 1]:
            predict = session(quantized, precise=precise)
            network = f"its own {calibration}, {kernels}"
            yield Row(name, network, predict, quantized.ByteSize(), "float")


def _session(
    threads: int, model: onnx.ModelProto, optimizes: bool = True, precise: bool = True
) -> Predict:
    """A model in ONNX Runtime.

    Args:
      threads: that it uses, 0 for one per core.
      model: what is run.
      optimizes: whether operators are fused.
      precise: whether sums of products of int8 may not saturate at 16 bits, as they do by default
        on a CPU without int8 dot instructions.
    """
    import onnxruntime

    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.intra_op_num_threads = threads
    if not optimizes:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    [name] = (value.name for value in session.get_inputs())
    return lambda x: session.run(None, {name: x})[0]


def _quantize_static(models: Models, calibration: str) -> onnx.ModelProto:
    """ONNX Runtime's own quantization of the float model, on the same images."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            images = models.calibration
            self.batches = iter(np.split(images, range(64, len(images), 64)))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {models.floats.graph.input[0].name: batch}

    with tempfile.TemporaryDirectory() as folder:
        prepared, path = (str(Path(folder) / f"{name}.onnx") for name in ("prepared", "quantized"))
        quantization.quant_pre_process(models.floats, prepared)
        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, calibration),
        )
        return onnx.load(path)


def in_openvino(models: Models) -> Iterator[Row]:
    """The float model and qjax's quantized one."""
    import openvino  # type: ignore

    core = openvino.Core()
    networks = (("float", models.floats, "float"), ("qjax", models.quantized, "quantized"))
    for network, model, like in networks:
        read = core.read_model(model.SerializeToString())
        compiled = core.compile_model(read, "CPU")
        predict = lambda x, run=compiled: run(x)[0]  # noqa: E731
        yield Row("OpenVINO", network, predict, model.ByteSize(), like)


RUNTIMES = (
    Runtime("jax", in_jax),
    Runtime("onnxruntime", in_onnx_runtime),
    Runtime("openvino", in_openvino),
)


def main() -> None:
    """Compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="resnet20-digits", metavar="NAME|PATH", help="(%(default)s)")
    add("--artifact", metavar="DIR", help="what `qjax quantize --out DIR` made of it")
    add("--bits", type=int, default=8, metavar="N", help="of all tensors (%(default)s)")
    add("--batches", nargs="+", type=int, default=[1, 32, 128], metavar="N", help="images per call")
    add("--threads", type=int, default=0, metavar="N", help="of ONNX Runtime (one per core)")
    add("--seconds", type=float, default=4.0, metavar="S", help="per variant (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    arguments = parser.parse_args()
    models = load(arguments)
    rows = [
        row
        for runtime in RUNTIMES
        if importlib.util.find_spec(runtime.package)
        for row in runtime.rows(models)
    ]
    missing = [r.package for r in RUNTIMES if not importlib.util.find_spec(r.package)]
    with progress_bar("evaluating") as progress:
        results = evaluate(models, rows, progress)
    with progress_bar("timing") as progress:
        time(models, rows, results, arguments, progress)
    print(written(results, arguments.batches))
    test = datasets.load(models.model.dataset, "test")
    print(f"\n{len(test.images):,} test images of {test.name}; {device()}")
    if missing:
        print(f"not installed: {', '.join(missing)}")
    if arguments.json:
        print(json.dumps(results))


def load(arguments: argparse.Namespace) -> Models:
    """Quantizes and exports a model."""
    model = pretrained.load(arguments.model)
    images = datasets.load(model.dataset, "train").images
    count = min(CALIBRATION_SIZE, len(images))
    calibration = np.asarray(model.preprocess(datasets.calibration_draw(images, count, 0)))
    if arguments.artifact is None:
        recipe = qjax.recipe(arguments.bits, target="onnxruntime")
        q = qjax.quantize(model.apply_fn, model.params, calibration, recipe, progress=True)
    else:
        q = qjax.load(arguments.artifact, model.apply_fn, model.params)
    x = calibration[:1]
    floats = qjax.to_onnx(model.apply_fn, model.params, x)
    return Models(model, q, calibration, floats, qjax.to_onnx(q, x), arguments.threads)


def evaluate(models: Models, rows: list[Row], progress: Any) -> list[dict[str, Any]]:
    """Top-1 and agreement with JAX on all test images."""
    test = datasets.load(models.model.dataset, "test")
    logits = {}
    results = []
    for done, row in enumerate(rows):
        progress(f"{row.runtime} {row.network}", done, len(rows))
        batches = (
            np.asarray(row.predict(np.asarray(models.model.preprocess(images))))
            for images in np.split(test.images, range(TEST_BATCH, len(test.images), TEST_BATCH))
        )
        found = np.concatenate(list(batches))
        reference = logits.setdefault(row.like, found)  # JAX comes first
        results.append(
            {
                "runtime": row.runtime,
                "network": row.network,
                "top1": float(100 * (found.argmax(-1) == test.labels).mean()),
                "like": row.like,
                "same_class": float(100 * (found.argmax(-1) == reference.argmax(-1)).mean()),
                "close": float(100 * (np.abs(found - reference).max(-1) <= CLOSE).mean()),
                "bytes": row.size,
            }
        )
    return results


def time(
    models: Models,
    rows: list[Row],
    results: list[dict[str, Any]],
    arguments: argparse.Namespace,
    progress: Any,
) -> None:
    """Adds images per second to the results, all rows taking turns."""
    timed = [(row, result) for row, result in zip(rows, results, strict=True) if row.is_timed]
    for done, batch in enumerate(arguments.batches):
        progress(f"{batch} images", done, len(arguments.batches))
        x = np.resize(models.calibration, (batch, *models.calibration.shape[1:]))
        turns = [partial(row.predict, x) for row, _ in timed]
        times = side_by_side(turns, arguments.seconds)
        for (_, result), seconds in zip(timed, times.median, strict=True):
            result[f"images_per_second_{batch}"] = batch / seconds


def written(results: list[dict[str, Any]], batches: list[int]) -> str:
    """The results as a table."""
    header = ("runtime", "network", "top-1", "same class", "within 1e-5", "kB")
    speeds = tuple(f"images/s at {batch}" for batch in batches)

    def cells(result: dict[str, Any]) -> tuple[str, ...]:
        shares = (f"{result[key]:.2f}" for key in ("top1", "same_class", "close"))
        found = (result.get(f"images_per_second_{batch}") for batch in batches)
        return (
            *(result["runtime"], result["network"], *shares, f"{result['bytes'] / 1e3:,.0f}"),
            *("" if speed is None else f"{speed:,.0f}" for speed in found),
        )

    align = "<<" + ">" * (len(header) + len(speeds) - 2)
    return table((*header, *speeds), [cells(result) for result in results], align)


if __name__ == "__main__":
    main()
