"""Trains reference models, each to a folder under `pretrained/`, or one with quantized values.

Training that was interrupted goes on where it stopped.

  python scripts/train.py resnet20-digits mlp-mnist
  python scripts/train.py --qat lsq --bits 3 --init-from resnet20-mnist --epochs 1 --out lsq3
"""

import argparse
import dataclasses
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import pretrained
import qjax
from pretrained import cards, datasets, finetuning, training
from pretrained.models import describe
from pretrained.recipes import RECIPES, Recipe
from qjax.artifact import check_destination
from qjax.formats.spec import check_choice
from qjax.qat import METHODS

Show = tuple[Callable[[training.Progress], None], Callable[[training.Entry], None]]


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=", ".join(RECIPES))
    parser.add_argument("--data-dir", help="where TFDS datasets are (default: TFDS_DATA_DIR)")
    parser.add_argument(
        "--output", type=Path, default=pretrained.FOLDER, help="folder of the models' folders"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=datasets.cache_dir() / "training",
        help="where states are kept",
    )
    parser.add_argument("--restart", action="store_true", help="forget the state of an earlier run")
    _add_quantized(parser)
    arguments = parser.parse_args()
    try:
        if arguments.qat is not None:
            if arguments.recipes:
                raise ValueError("`--qat` takes its model from `--init-from`, and no recipe.")
            train_quantized(arguments)
        elif not arguments.recipes:
            raise ValueError("name a recipe, or pass --qat METHOD; see --help.")
        for name in arguments.recipes:
            check_choice("recipe", name, RECIPES)
        for name in arguments.recipes:
            train(RECIPES[name], arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def _add_quantized(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("quantization-aware training").add_argument
    add("--qat", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--init-from", default="resnet20-digits", metavar="NAME|PATH", help="(%(default)s)")
    add(
        "--bits",
        type=int,
        default=8,
        metavar="N",
        help="weights, inputs, outputs (%(default)s); kernels have one bit in binary_* and xnor",
    )
    add(
        "--first-last-bits",
        type=lambda text: None if text == "same" else int(text),
        default=finetuning.ENDS,
        metavar="N|same",
        help="width in the first and last layer (%(default)s), or same as in the others",
    )
    add("--weights-only", action="store_true", help="leave inputs and outputs in float")
    add("--epochs", type=float, default=1.0, metavar="N", help="(%(default)s)")
    add("--learning-rate", type=float, metavar="RATE", help="peak learning rate (the method's own)")
    add(
        "--loss",
        choices=finetuning.LOSSES,
        default="labels",
        metavar="NAME",
        help="what is minimized: cross-entropy with the labels, or divergence from the float "
        "network's logits (teacher); default: %(default)s",
    )
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--out", metavar="DIR", help="save the quantized model for qjax.load")


def train_quantized(arguments: argparse.Namespace) -> None:
    """Trains a pretrained model with quantized values and prints what came of it."""
    if arguments.out is not None:
        check_destination(arguments.out)
    loaded = pretrained.load(arguments.init_from)
    quantization = finetuning.quantization(
        arguments.qat, arguments.bits, arguments.first_last_bits, arguments.weights_only
    )
    recipe = finetuning.fine_tuning(
        loaded,
        arguments.qat,
        quantization,
        arguments.epochs,
        arguments.learning_rate,
        seed=arguments.seed,
        loss=arguments.loss,
    )
    data, test = (
        datasets.load(loaded.dataset, split, arguments.data_dir) for split in ("train", "test")
    )
    state_file = arguments.state_dir / f"{recipe.identifier}.safetensors"
    if arguments.restart:
        state_file.unlink(missing_ok=True)
    with bars(recipe.name) as (on_progress, on_entry):
        result = finetuning.train(loaded, recipe, data, test, state_file, on_progress, on_entry)
    q = result.q
    accuracy = qjax.top1(
        q.apply_fn, q.params, test.images, test.labels, preprocess=loaded.preprocess
    )
    print(q.report)
    print(
        f"\ntop-1        {result.start:.2f} % before training, {accuracy:.2f} % trained, "
        f"{len(test.images):,} test images of {test.name}\n"
        f"training     {result.trained.seconds:.0f} s, {arguments.epochs:g} epochs of "
        f"{len(data.images):,} images (seed {arguments.seed})"
    )
    if arguments.out is not None:
        qjax.save(arguments.out, q)
        print(f"saved        {arguments.out}")


@contextmanager
def bars(name: str) -> Iterator[Show]:
    """Shows training as a bar, with a line above it for every entry of the log."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=Console(width=100),
    )
    with bar:
        task = bar.add_task(name, total=None, loss=float("nan"))

        def show(entry: training.Entry) -> None:
            loss = f"loss {entry.loss:.4f}, " if entry.epoch else ""
            bar.console.print(
                f"{name} epoch {entry.epoch:g}: {loss}"
                f"accuracy {entry.accuracy:.2f} %, {entry.seconds:.0f} s",
                highlight=False,
            )

        yield lambda p: bar.update(task, completed=p.step, total=p.steps, loss=p.loss), show


def train(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Trains one recipe and writes its model."""
    state_file = arguments.state_dir / f"{recipe.name}.safetensors"
    if arguments.restart:
        state_file.unlink(missing_ok=True)
    data, held_out = (
        datasets.load(recipe.dataset, split, arguments.data_dir) for split in ("train", "test")
    )
    with bars(recipe.name) as (on_progress, on_entry):
        trained = training.train(recipe, data, held_out, state_file, on_progress, on_entry)
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    card = {
        "name": recipe.name,
        "dataset": recipe.dataset,
        "accuracy": trained.log[-1].accuracy,
        "test_images": len(held_out.images),
        "command": f"python scripts/train.py {recipe.name}",
        "seconds": round(trained.seconds),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "architecture": describe(recipe.model),
        "preprocessing": recipe.preprocessing._asdict(),
        "recipe": {
            k: v
            for k, v in fields.items()
            if k not in ("name", "dataset", "model", "preprocessing")
        },
        "log": [entry._asdict() for entry in trained.log],
    }
    cards.write(arguments.output / recipe.name, trained.variables, card)


if __name__ == "__main__":
    main()
