"""The command line: `qjax quantize` quantizes a pretrained model and reports what that costs.

The other commands and the options of `quantize` that choose widths have modules of their own.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax

import pretrained
from pretrained import datasets
from qjax import artifact
from qjax.cli import accumulators, explain, study, widths
from qjax.formats.spec import (
    ActivationGranularity,
    OutputPosition,
    RangeMethod,
    Recipe,
    Rounding,
    recipe,
)
from qjax.page import quantization
from qjax.page.document import check_destination, write
from qjax.progress import Progress, progress_bar
from qjax.quantize import quantize
from qjax.study.accuracy import top1
from qjax.study.cost import MODELS, cost

CALIBRATION_SIZE = 1024  # training images, or all of them if there are fewer
MODEL = "resnet20-digits"

_PARTS = {"weight": "weights", "input": "inputs", "output": "outputs"}  # option: field of a recipe

Stage = Callable[[str], contextlib.AbstractContextManager[Progress]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: its arguments; by default those of the process.

    Returns:
      The exit code: 0, or 2 for bad input, with the reason on standard error.
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"qjax: error: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qjax", description="Post-training quantization of JAX networks.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_command(commands, explain, "explain", "follow one layer step by step on a test image")
    _add_command(
        commands, accumulators, "accumulators", "measure how wide the accumulators must be"
    )
    _add_command(commands, study, "study", "answer a question by quantizing in several ways")
    return parser


def _add_command(commands: Any, module: Any, name: str, summary: str) -> None:
    """Adds a command that quantizes a model as `qjax quantize` would and prints one text."""
    text = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=text)
    module.add_arguments(parser)
    _add_model(parser)
    _add_how(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=partial(_run_command, module))


def _run_command(module: Any, arguments: argparse.Namespace) -> None:
    wanted = _recipe(arguments)
    check_destination(vars(arguments).get("report"))
    stage: Stage = _no_bar if arguments.quiet or not sys.stderr.isatty() else progress_bar
    with stage("loading") as progress:
        loaded = _load(arguments, progress)
    with stage("quantizing") as progress:
        text = module.run(arguments, *loaded, wanted, progress)
    print(text)


# ---- qjax quantize


def _add_quantize(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize",
        help="quantize a pretrained model and compare it with the float one",
        description="Quantizes a pretrained model on training images, without their labels, and "
        "compares its top-1 accuracy on all test images with the float model's.",
    )
    parser.set_defaults(run=_run_quantize)
    _add_model(parser)
    _add_how(parser)
    widths.add_arguments(parser)
    add = parser.add_argument_group("what to write").add_argument
    add(
        "--baseline",
        action="store_true",
        help="also quantize naively (absmax ranges, nearest rounding, no correction)",
    )
    add(
        "--cost",
        choices=MODELS,
        metavar="MODEL",
        help="table of operations, bytes and energy, by a "
        "model: bits (E = multiplications * b_w * b_x + additions * b_acc) or picojoules (45 nm)",
    )
    add("--report", metavar="FILE", help="write a page to read: report.html")
    add("--out", metavar="DIR", help="save the quantized model for qjax.load")
    add("--json", action="store_true", help="end standard output with the results as one JSON line")
    add("--quiet", action="store_true", help="no progress bars")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to quantize").add_argument
    add("--model", default=MODEL, metavar="NAME|PATH", help="pretrained model (%(default)s)")
    add("--dataset", metavar="NAME", help="digits or a TFDS name (the model's own)")
    add(
        "--calibration-size",
        type=_at_least_one,
        metavar="N",
        help=f"training images to calibrate on ({CALIBRATION_SIZE}, or all if there are fewer)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of their draw (%(default)s)")


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how (widths are 2 to 16 bits)").add_argument
    add(
        "--recipe", metavar="FILE", help="from the JSON of an earlier run; all else here is ignored"
    )
    add("--bits", type=int, default=8, metavar="N", help="weights, inputs, outputs (%(default)s)")
    for part in _PARTS:
        add(
            f"--{part}-bits",
            type=_width,
            metavar="N|float",
            help=f"width of the {part}s, or float to leave them (--bits)",
        )
    add("--first-last-bits", type=int, metavar="N", help="width in the first and last layer")
    add(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="PATTERN=N|float",
        help="width in the layers whose name matches a glob, e.g. '*conv1=4', of what is not in "
        "float; repeatable, later ones win",
    )
    choose = partial(_add_choice, add)
    choose("--range-method", RangeMethod, Recipe.range_method, "how clipping ranges are chosen")
    choose(
        "--activation-granularity",
        ActivationGranularity,
        "per_tensor",
        "of the scales of inputs and outputs",
    )
    choose("--output-position", OutputPosition, Recipe.output_position, "where outputs are rounded")
    choose("--rounding", Rounding, Recipe.rounding, "of the weights")
    add(
        "--sweeps",
        type=int,
        default=Recipe.sweeps,
        metavar="N",
        help="coordinate sweeps after rounding (%(default)s)",
    )
    add("--no-bias-correction", action="store_true", help="keep the mean error of each channel")
    add("--equalize", action="store_true", help="even out the channels between two layers first")
    add(
        "--logits",
        action="store_true",
        help="choose the range of the network's output by the error of the classes' probabilities",
    )
    add(
        "--reconstructions",
        type=int,
        default=Recipe.reconstructions,
        metavar="N",
        help="least-squares fits of every kernel to its quantized input (%(default)s)",
    )
    add("--no-sequential", action="store_true", help="fit every layer on float inputs")


def _add_choice(add: Callable[..., Any], flag: str, choices: Any, default: str, text: str) -> None:
    names = get_args(choices)
    help_text = f"{text}: {', '.join(names)} (%(default)s)"
    add(flag, choices=names, default=default, metavar="NAME", help=help_text)


def _width(text: str) -> int | str:
    """Reads a number of bits, or `float`."""
    if text in ("float", "none"):
        return "float"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of bits or float; got {text!r}"
        ) from None


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """Reads PATTERN=WIDTH as an entry of `Recipe.overrides`."""
    pattern, equals, width = text.rpartition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"expected PATTERN=N or PATTERN=float; got {text!r}")
    bits = _width(width)
    return pattern, dict.fromkeys(_PARTS.values()) if bits == "float" else {"bits": bits}


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 image; got {text!r}")
    return int(text)


def _run_quantize(arguments: argparse.Namespace) -> None:
    wanted = _recipe(arguments)
    if arguments.out is not None:
        artifact.check_destination(arguments.out)
    check_destination(arguments.report)
    widths.check(arguments, wanted)
    is_silent = arguments.quiet or not sys.stderr.isatty()
    stage: Stage = _no_bar if is_silent else progress_bar
    with stage("loading") as progress:
        model, calibration, test = _load(arguments, progress)
    start = time.perf_counter()
    with stage("quantizing") as progress:
        if widths.is_wanted(arguments):
            q, chosen = widths.run(arguments, model, calibration, wanted, progress)
            wanted = q.report.recipe
            print(f"{chosen}\n")
        elif arguments.search_bits is None:
            q = quantize(model.apply_fn, model.params, calibration, wanted, progress=progress)
        else:
            q, tried = study.search(arguments, model, calibration, test, wanted, progress)
            wanted = q.report.recipe
            print(tried)
    seconds = time.perf_counter() - start
    measure = partial(top1, images=test.images, labels=test.labels, preprocess=model.preprocess)
    with stage("evaluating float") as progress:
        float_top1 = measure(model.apply_fn, model.params, progress=progress)
    with stage("evaluating quantized") as progress:
        quantized_top1 = measure(q.apply_fn, q.params, progress=progress)
    naive_top1 = None
    if arguments.baseline:
        with stage("quantizing naively") as progress:
            naive = quantize(
                model.apply_fn, model.params, calibration, wanted.naive(), progress=progress
            )
        with stage("evaluating naive") as progress:
            naive_top1 = measure(naive.apply_fn, naive.params, progress=progress)
    if arguments.out is not None:
        artifact.save(arguments.out, q)
    result = {
        "model": model.name,
        "dataset": test.name,
        "calibration_images": len(calibration),
        "seed": arguments.seed,
        "test_images": len(test.images),
        "float_top1": float_top1,
        "quantized_top1": quantized_top1,
        "naive_top1": naive_top1,
        "bytes_float": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "bytes_quantized": artifact.stored_bytes(q),
        "bit_operations": cost(q).total.bit_operations,
        "seconds": seconds,
        "recipe": wanted.to_json(),
        "layers": [artifact.record_to_json(record) for record in q.report],
        "versions": artifact.versions(),
    }
    print(q.report, _summary(result), sep="\n\n")
    if arguments.cost is not None:
        print(f"\n{cost(q, model=arguments.cost)}\n")
    if arguments.out is not None:
        print(f"saved        {arguments.out}")
    if arguments.report is not None:
        with stage("measuring") as progress:
            sizes = result["bytes_float"], result["bytes_quantized"]
            facts = quantization.gather(q, model, calibration, test, sizes, progress)
        write(arguments.report, quantization.render(facts))
        print(f"page         {arguments.report}")
    if arguments.json:
        print(json.dumps(result, allow_nan=False))


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.recipe is not None:
        return _read_recipe(Path(arguments.recipe))
    fields: dict[str, Any] = {}
    for part, field in _PARTS.items():
        width = getattr(arguments, f"{part}_bits")
        fields |= {field: None} if width == "float" else {f"{part}_bits": width}
    return recipe(
        arguments.bits,
        first_last_bits=arguments.first_last_bits,
        activation_granularity=arguments.activation_granularity,
        range_method=arguments.range_method,
        output_position=arguments.output_position,
        rounding=arguments.rounding,
        reconstructions=arguments.reconstructions,
        sweeps=arguments.sweeps,
        equalize=arguments.equalize,
        logits=arguments.logits,
        sequential=not arguments.no_sequential,
        bias_correction=not arguments.no_bias_correction,
        overrides=arguments.override,
        **fields,
    )


def _read_recipe(path: Path) -> Recipe:
    """Reads a recipe: the `recipe` of a JSON object, or the object itself."""
    try:
        found = json.loads(path.read_text())
        return Recipe.from_json(found.get("recipe", found))
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--recipe` must name a file with a recipe (the JSON line of --json, or the manifest "
            f"of --out); {path} holds none: {error}."
        ) from error


@contextlib.contextmanager
def _no_bar(stage: str) -> Iterator[Progress]:
    yield lambda item, done, total: None


def _load(arguments: argparse.Namespace, progress: Progress) -> tuple[Any, Any, Any]:
    """Loads (model, calibration inputs, test split)."""
    progress("model", 0, 3)
    model = pretrained.load(arguments.model)
    name = arguments.dataset or model.dataset
    try:
        progress("training images", 1, 3)
        images = datasets.load(name, "train").images
        progress("test images", 2, 3)
        test = datasets.load(name, "test")
    except RuntimeError as error:  # the dataset could not be prepared
        raise ValueError(error) from error
    size = arguments.calibration_size or min(CALIBRATION_SIZE, len(images))
    calibration = model.preprocess(datasets.calibration_draw(images, size, arguments.seed))
    try:
        jax.eval_shape(model.apply_fn, model.params, calibration[:1])
    except Exception as error:  # each framework has its own
        raise ValueError(
            f"`--dataset` {name} has images of shape {images.shape[1:]}, which the model "
            f"{model.name} does not take; leave it out to use the model's own, {model.dataset}."
        ) from error
    progress("", 3, 3)
    return model, calibration, test


def _summary(result: dict[str, Any]) -> str:
    before, after = result["float_top1"], result["quantized_top1"]
    naive = result["naive_top1"]
    beside = "" if naive is None else f", {naive:.2f} % naively ({naive - before:+.2f})"
    size, small = result["bytes_float"], result["bytes_quantized"]
    return "\n".join(
        (
            f"top-1        {before:.2f} % float, {after:.2f} % quantized ({after - before:+.2f})"
            f"{beside}, {result['test_images']:,} test images of {result['dataset']}",
            f"parameters   {size:,} bytes float, {small:,} quantized ({size / small:.2f}x smaller)",
            f"calibration  {result['seconds']:.1f} s on {result['calibration_images']:,} training "
            f"images, without labels (seed {result['seed']})",
        )
    )
