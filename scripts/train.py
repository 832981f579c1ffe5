"""Trains reference models and writes each one's folder under `pretrained/`.

Training that was interrupted goes on where it stopped.

  python scripts/train.py resnet20-digits mlp-mnist
"""

import argparse
import dataclasses
import platform
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import pretrained
from pretrained import cards, datasets, training
from pretrained.models import describe
from pretrained.recipes import RECIPES, Recipe


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "recipes", nargs="+", choices=RECIPES, metavar="recipe", help=", ".join(RECIPES)
    )
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
    arguments = parser.parse_args()
    for name in arguments.recipes:
        train(RECIPES[name], arguments)


def train(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Trains one recipe and writes its model."""
    state_file = arguments.state_dir / f"{recipe.name}.safetensors"
    if arguments.restart:
        state_file.unlink(missing_ok=True)
    data, held_out = (
        datasets.load(recipe.dataset, split, arguments.data_dir) for split in ("train", "test")
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=Console(width=100),
    )
    with bar:
        task = bar.add_task(recipe.name, total=None, loss=float("nan"))

        def show(entry: training.Entry) -> None:
            bar.console.print(
                f"{recipe.name} epoch {entry.epoch:g}: loss {entry.loss:.4f}, "
                f"accuracy {entry.accuracy:.2f} %, {entry.seconds:.0f} s",
                highlight=False,
            )

        trained = training.train(
            recipe,
            data,
            held_out,
            state_file,
            lambda p: bar.update(task, completed=p.step, total=p.steps, loss=p.loss),
            show,
        )
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
