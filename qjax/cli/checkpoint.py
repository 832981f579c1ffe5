"""`--checkpoint`: a folder for finished work, emptied when the command has ended well."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qjax.cli.loading import Loaded
from qjax.fit import checkpoint as layers
from qjax.fit import ends
from qjax.graph.fingerprint import digest
from qjax.kept import Kept
from qjax.recipe import Recipe
from qjax.tuning import tune
from qjax.versions import versions

ROWS = "rows.jsonl"


def add_argument(add: Callable[..., Any]) -> None:
    """Declares the option, by a parser's or a group's `add_argument`."""
    add(
        "--checkpoint",
        metavar="DIR",
        help="keep finished work in this folder until the command has ended; after a kill the same "
        "command resumes from it",
    )


def kept(arguments: argparse.Namespace, loaded: Loaded, recipe: Recipe, **more: Any) -> Kept:
    """The finished work of a command, none without the option.

    Args:
      arguments: of the command.
      loaded: the model and its images, which the work depends on.
      recipe: of the command.
      **more: what else it depends on.
    """
    if arguments.checkpoint is None:
        return Kept()
    model, calibration, test = loaded
    about = {
        "model": [model.name, digest(model.params)],
        "images": digest(calibration),
        "test images": digest((test.images, test.labels)),
        "recipe": recipe.to_json(),
        "versions": versions(),
        **more,
    }
    return Kept(Path(arguments.checkpoint, ROWS), about)


@contextlib.contextmanager
def removed_at_end(arguments: argparse.Namespace) -> Iterator[None]:
    """Removes the finished work, and an empty folder, unless the context ends in an error."""
    yield
    if arguments.checkpoint is not None:
        folder = Path(arguments.checkpoint)
        for name in (layers.FILE, ends.FILE, tune.FILE, ROWS):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
