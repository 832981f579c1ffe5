"""`qjax export`: writes a model for another runtime."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pretrained
from qjax import artifact, atomic
from qjax.cli.command import Command
from qjax.cli.files import check_file
from qjax.cli.loading import add_dataset, an_image
from qjax.export import function
from qjax.export.function import ONNX_TARGETS, to_onnx
from qjax.formats.spec import check_choice
from qjax.quantize import Quantized
from qjax.recipe import Recipe
from qjax.targets import ONNXRUNTIME


class Form(NamedTuple):
    """A form that models are written in.

    Attributes:
      check: refuses it where a package is missing.
      write: of (`to_onnx`'s network and arguments, target, metadata): the bytes of the file.
    """

    check: Callable[[], None]
    write: Callable[..., bytes]


def _onnx(*network: Any, target: str, metadata: dict[str, Any]) -> bytes:
    return to_onnx(*network, target=target, metadata=metadata).SerializeToString()


FORM = "onnx"
FORMS = {FORM: Form(function.check_installed, _onnx)}


def check(path: str, recipe: Recipe, target: str) -> None:
    """Refuses an export of what is yet to be quantized, before any work is done.

    Args:
      path: of the file, that `--export` names.
      recipe: of the quantization.
      target: what is to run it.

    Raises:
      ValueError: the file cannot be written, or the target cannot run what the recipe makes.
      ImportError: a package is missing.
    """
    check_file("--export", path)
    FORMS[FORM].check()
    check_choice("--target", target, ONNX_TARGETS)
    recipe.check_target(ONNX_TARGETS[target])


def write(path: str, *network: Any, form: str = FORM, **options: Any) -> None:
    """Writes a model.

    Args:
      path: of the file.
      *network: as `to_onnx` takes it.
      form: a name in `FORMS`.
      **options: target and metadata.
    """
    atomic.write(path, FORMS[form].write(*network, **options))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add = parser.add_argument
    add("source", metavar="MODEL", help="folder that qjax.save wrote, or a pretrained model")
    add(
        "--model",
        metavar="NAME|PATH",
        help="pretrained model that the folder was quantized from",
    )
    add_dataset(add)
    add("--to", choices=tuple(FORMS), default=FORM, help="form to write (%(default)s)")
    add("--out", required=True, metavar="FILE", help="file to write: model.onnx")
    add(
        "--target",
        choices=tuple(ONNX_TARGETS),
        default=ONNXRUNTIME.name,
        metavar="NAME",
        help=f"runtime for the export: {', '.join(ONNX_TARGETS)} (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes a saved or a float model.

    Raises:
      ValueError: an option is not possible.
    """
    check_file("--out", arguments.out)
    FORMS[arguments.to].check()
    is_saved = (Path(arguments.source) / artifact.MANIFEST).is_file()
    if arguments.model is not None and not is_saved:
        raise ValueError(
            f"`--model` goes with a folder that qjax.save wrote, and {arguments.source} is none; "
            "leave it out to export that model in float."
        )
    if is_saved and arguments.model is None:
        raise ValueError(
            f"`--model` must name the pretrained model that {arguments.source} was quantized from; "
            "it holds the codes and not the network."
        )
    model = pretrained.load(arguments.model or arguments.source)
    x = an_image(model, arguments.dataset)
    network: tuple[Any, ...] = model.apply_fn, model.params, x
    if is_saved:
        network = artifact.load(arguments.source, model.apply_fn, model.params), x
    options = {"target": arguments.target, "metadata": {"model": model.name}}
    write(arguments.out, *network, form=arguments.to, **options)
    kind = "quantized" if isinstance(network[0], Quantized) else "float"
    size = os.path.getsize(arguments.out)
    print(f"exported     {arguments.out} ({kind} {model.name}, {size:,} bytes)")


COMMAND = Command(
    "export",
    "write a saved or pretrained model for another runtime",
    "Writes a model that qjax.save wrote, or a pretrained one in float, as ONNX.",
    add_arguments,
    run,
)
