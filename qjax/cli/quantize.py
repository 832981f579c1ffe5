"""`qjax quantize`: quantizes a pretrained model and reports what that costs."""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from qjax import artifact, charts, hosts
from qjax.atomic import write
from qjax.cli import checkpoint, export, processes, tune, widths
from qjax.cli.arguments import add_model, add_recipe, load_model, read_recipe
from qjax.cli.command import Command, Stage, add_quiet, stages
from qjax.cli.files import check_apart, check_file
from qjax.cli.loading import Loaded
from qjax.cli.output import columns
from qjax.cli.wording import flag, worded
from qjax.fit.data_free import UnknownRangeError
from qjax.fit.memory import MEMORIES
from qjax.graph.layers import shapes_of
from qjax.page import quantization
from qjax.progress import Progress
from qjax.quantize import Quantized, quantize
from qjax.recipe import Recipe
from qjax.study.accuracy import top1
from qjax.study.cost import MODELS, cost
from qjax.targets import ONNXRUNTIME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add_model(parser)
    add_recipe(parser)
    widths.add_arguments(parser)
    parser.add_argument(
        "--data-free",
        action="store_true",
        help="quantize without any image: ranges of activations come from batch norm; add "
        "--activation-ranges dynamic for ranges at run time, or --input-bits float --output-bits "
        "float for weights alone",
    )
    parser.add_argument(
        "--memory",
        choices=tuple(MEMORIES),
        metavar="NAME",
        help="where the values between layers are kept while layers are fitted: "
        f"{', '.join(MEMORIES)} (the first one where they fit)",
    )
    tune.add_arguments(parser.add_argument_group("tuning").add_argument)
    add = parser.add_argument_group("output").add_argument
    add(
        "--baseline",
        action="store_true",
        help="quantize naively as well, for comparison: absmax ranges, nearest rounding, no "
        "correction",
    )
    add(
        "--cost",
        choices=MODELS,
        metavar="MODEL",
        help="print a table of operations, bytes and energy, by a "
        "model: bits (E = multiplications * b_w * b_x + additions * b_acc) or picojoules (45 nm)",
    )
    processes.add_arguments(parser.add_argument_group("many processes").add_argument)
    add("--report", metavar="FILE", help="write a report as a web page: report.html")
    add("--out", metavar="DIR", help="save the quantized model for qjax.load")
    add("--export", metavar="FILE", help="write the quantized model as ONNX: model.onnx")
    checkpoint.add_argument(add)
    add("--json", action="store_true", help="print the results as one line of JSON at the end")
    add_quiet(add)


def run(arguments: argparse.Namespace) -> None:
    """Quantizes a model, compares it with the float one, and prints and writes what was asked for.

    Raises:
      ValueError: an option is not possible.
    """
    processes.check(arguments)
    with processes.joined(arguments) as mesh:
        _run(arguments, mesh)


def _run(arguments: argparse.Namespace, mesh: jax.sharding.Mesh | None) -> None:
    recipe = read_recipe(arguments)
    if mesh is None:
        _check_outputs(arguments, recipe)
    else:
        hosts.together(lambda: _check_outputs(arguments, recipe) if hosts.is_first() else None)
    widths.check(arguments, recipe)
    tune.check(arguments)
    _check_data_free(arguments)
    _check_search(arguments)
    stage = stages(arguments)
    with stage("loading") as progress:
        loaded = load_model(arguments, progress)
    q, seconds = _quantized(arguments, loaded, recipe, stage, mesh)
    tuned = None
    if arguments.tune is not None:
        with stage("tuning") as progress:
            tuned = tune.run(arguments, loaded, q, progress)
        q = tuned.q
    accuracies = _accuracies(arguments, loaded, q, stage, mesh)
    result = _result(arguments, loaded, q, accuracies, seconds) | {"tuning": None}
    if tuned is not None:
        result["tuning"] = tune.to_json(arguments, tuned)
    if hosts.is_first():
        with checkpoint.removed_at_end(arguments):
            _write(arguments, loaded, q, result, stage)


def _check_outputs(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Refuses outputs that cannot be written."""
    outputs = {"--out": arguments.out, "--report": arguments.report, "--export": arguments.export}
    outputs["--checkpoint"] = arguments.checkpoint
    for option in ("--report", "--export"):
        check_file(option, outputs[option])
    if arguments.report is not None:
        charts.require()
    if arguments.out is not None:
        with worded({"path": "`--out`"}):
            artifact.check_destination(arguments.out)
    check_apart(outputs)
    if arguments.export is not None:
        export.check(arguments.export, recipe, _target(arguments))


def _check_search(arguments: argparse.Namespace) -> None:
    """Refuses what searches of widths do not take."""
    if arguments.checkpoint is not None and arguments.search_bits is not None:
        raise ValueError("`--search-bits` keeps nothing; leave out `--checkpoint`.")
    for option in ("search_bits", "target_drop"):
        if arguments.memory is not None and getattr(arguments, option) is not None:
            raise ValueError(
                f"`{flag(option)}` quantizes many times, and chooses the memory each time; leave "
                "out `--memory`."
            )


def _write(
    arguments: argparse.Namespace,
    loaded: Loaded,
    q: Quantized,
    result: dict[str, Any],
    stage: Stage,
) -> None:
    """Prints and writes what was asked for."""
    try:
        print(q.report.text(columns()), _summary(result), sep="\n\n")
        if arguments.cost is not None:
            print(f"\n{cost(q, model=arguments.cost)}\n")
        if arguments.out is not None:
            artifact.save(arguments.out, q)
            print(f"saved        {arguments.out}")
        if arguments.export is not None:
            _export(arguments, q, loaded, result)
        if arguments.report is not None:
            with stage("measuring") as progress:
                sizes = result["bytes_float"], result["bytes_quantized"]
                facts = quantization.gather(q, *loaded, sizes, progress)
            write(arguments.report, quantization.render(facts))
            print(f"page         {arguments.report}")
    finally:  # an export or a page that fails costs itself alone
        if arguments.json:
            print(json.dumps(result, allow_nan=False))


def _check_data_free(arguments: argparse.Namespace) -> None:
    """Refuses what needs images where there are none."""
    if not arguments.data_free:
        return
    if widths.is_wanted(arguments):
        raise ValueError(
            "`--data-free` has no images to choose widths on; give --bits, or leave it out."
        )
    for option in ("calibration_size", "checkpoint", "memory"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"`--data-free` takes no images; leave out `{flag(option)}`.")


def _export(
    arguments: argparse.Namespace, q: Quantized, loaded: Loaded, result: dict[str, Any]
) -> None:
    """Writes the quantized network as `--export` says."""
    known = ("model", "dataset", "test_dataset", "test_images", "float_top1", "quantized_top1")
    export.write(
        arguments.export,
        *(q, loaded.calibration[:1]),
        target=_target(arguments),
        metadata={name: result[name] for name in known},
    )
    print(f"exported     {arguments.export}")


def _target(arguments: argparse.Namespace) -> str:
    """What is to run the exported model."""
    return arguments.target or ONNXRUNTIME.name


def _quantized(
    arguments: argparse.Namespace,
    loaded: Loaded,
    recipe: Recipe,
    stage: Stage,
    mesh: jax.sharding.Mesh | None,
) -> tuple[Quantized, float]:
    """The quantized network and the seconds that it took; prints how its widths were found."""
    start = time.perf_counter()
    with stage("quantizing") as progress:
        if widths.is_wanted(arguments):
            q, found = widths.run(arguments, loaded, recipe, progress)
            print(f"{found}\n")
        else:
            q = _quantize(arguments, loaded, recipe, progress, mesh, arguments.checkpoint)
    return q, time.perf_counter() - start


def _quantize(
    arguments: argparse.Namespace,
    loaded: Loaded,
    recipe: Recipe,
    progress: Progress,
    mesh: jax.sharding.Mesh | None,
    folder: str | None = None,
) -> Quantized:
    """Quantizes the model on its calibration images, or without any."""
    model, input_range = loaded.model, None
    batches = processes.share(loaded.calibration, mesh)
    if arguments.data_free:
        batches = shapes_of(batches)
        white = getattr(model.preprocess, "scale", 255)
        pixels = np.stack([np.full_like(loaded.test.images[0], value) for value in (0, white)])
        ends = model.preprocess(pixels)
        input_range = float(ends.min()), float(ends.max())
    given: dict[str, Any] = {"progress": progress, "input_range": input_range, "checkpoint": folder}
    given |= {"memory": arguments.memory, "mesh": mesh}
    try:
        return quantize(model.apply_fn, model.params, batches, recipe, **given)
    except UnknownRangeError as error:
        raise ValueError(
            f"{error} Here: --activation-ranges dynamic, or --{error.tensor}-bits float."
        ) from error


def _accuracies(
    arguments: argparse.Namespace,
    loaded: Loaded,
    q: Quantized,
    stage: Stage,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, float | None]:
    """Top-1 in percent of the float network, the quantized one and, if asked for, a naive one."""
    model, _, test = loaded
    measure = partial(top1, images=test.images, labels=test.labels, preprocess=model.preprocess)

    def accuracy(name: str, apply_fn: Callable[..., Any], params: Any) -> float:
        with stage(f"evaluating {name}") as progress:
            return measure(apply_fn, params, progress=progress)

    found: dict[str, float | None] = {
        "float_top1": accuracy("float", model.apply_fn, model.params),
        "quantized_top1": accuracy("quantized", q.apply_fn, q.params),
        "naive_top1": None,
    }
    if arguments.baseline:
        with stage("quantizing naively") as progress:
            recipe = q.report.recipe.naive()
            naive = _quantize(arguments, loaded, recipe, progress, mesh)
        found["naive_top1"] = accuracy("naive", naive.apply_fn, naive.params)
    return found


def _result(
    arguments: argparse.Namespace,
    loaded: Loaded,
    q: Quantized,
    accuracies: dict[str, float | None],
    seconds: float,
) -> dict[str, Any]:
    """The results as they are written by `--json`."""
    return {
        "model": loaded.model.name,
        "dataset": arguments.dataset or loaded.model.dataset,
        "calibration_images": 0 if arguments.data_free else len(loaded.calibration),
        "seed": arguments.seed,
        "test_dataset": loaded.test.name,
        "test_images": len(loaded.test.images),
        **accuracies,
        "bytes_float": sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.model.params)),
        "bytes_quantized": artifact.stored_bytes(q),
        "bit_operations": cost(q).total.bit_operations,
        "seconds": seconds,
        "recipe": q.report.recipe.to_json(),
        "layers": [artifact.record_to_json(record) for record in q.report],
        "versions": artifact.versions(),
    }


def _summary(result: dict[str, Any]) -> str:
    before, after = result["float_top1"], result["quantized_top1"]
    naive = result["naive_top1"]
    naively = "" if naive is None else f", {naive:.2f} % naively ({naive - before:+.2f})"
    size, small = result["bytes_float"], result["bytes_quantized"]
    tuned = result["tuning"]
    images = f"{result['calibration_images']:,} training images of {result['dataset']}"
    used = f"on {images}, without labels (seed {result['seed']})"
    return "\n".join(
        (
            f"top-1        {before:.2f} % float, {after:.2f} % quantized ({after - before:+.2f})"
            f"{naively}, {result['test_images']:,} test images of {result['test_dataset']}",
            f"parameters   {size:,} bytes float, {small:,} quantized ({size / small:.2f}x smaller)",
            f"calibration  {result['seconds']:.1f} s "
            f"{used if result['calibration_images'] else 'without images'}",
            *([] if tuned is None else [tune.summary(tuned)]),
        )
    )


COMMAND = Command(
    "quantize",
    "quantize a pretrained model and compare it with the float one",
    "Quantizes a pretrained model on training images, without their labels, and "
    "compares its top-1 accuracy on all test images with the float model's.",
    add_arguments,
    run,
)
