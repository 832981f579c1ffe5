"""A command of the command line, and how it shows the stages of its work."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from qjax.cli import signals
from qjax.cli.arguments import add_model, add_recipe, load_model, read_recipe
from qjax.cli.files import check_file
from qjax.cli.loading import Loaded
from qjax.progress import Progress, progress_bar, progress_lines
from qjax.recipe import Recipe

Stage = Callable[[str], contextlib.AbstractContextManager[Progress]]
Answer = Callable[[argparse.Namespace, Loaded, Recipe, Progress], str]


class Command(NamedTuple):
    """What a user can ask for.

    Attributes:
      name: of the command.
      summary: its line in the list of commands.
      description: what its own help says first.
      add_arguments: declares its options.
      run: does it and prints what came of it.
    """

    name: str
    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def question(
    name: str,
    summary: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    answer: Answer,
) -> Command:
    """A command that quantizes a model as `qjax quantize` would and prints one text.

    Args:
      name: of the command.
      summary: what it does.
      add_arguments: declares what only this command takes.
      answer: makes the text of (arguments, model and images, recipe, progress).
    """

    def declare(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        add_model(parser)
        add_recipe(parser)
        add_quiet(parser.add_argument)

    def run(arguments: argparse.Namespace) -> None:
        recipe = read_recipe(arguments)
        check_file("--report", getattr(arguments, "report", None))
        stage = stages(arguments)
        with stage("loading") as progress:
            loaded = load_model(arguments, progress)
        with stage("quantizing") as progress:
            text = answer(arguments, loaded, recipe, progress)
        print(text)

    return Command(name, summary, f"{summary[0].upper()}{summary[1:]}.", declare, run)


def add_quiet(add: Callable[..., Any]) -> None:
    """Declares whether `stages` shows bars, by a parser's or a group's `add_argument`."""
    add("--quiet", action="store_true", help="show no progress")


def stages(arguments: argparse.Namespace) -> Stage:
    """How stages of work are shown: by a bar on a terminal, else by lines; `--quiet`: not at all.

    Every step of progress is a place where a signal ends the command.
    """
    shown = progress_bar if sys.stderr.isatty() else progress_lines
    return partial(_stoppable, _unseen if arguments.quiet else shown)


@contextlib.contextmanager
def _stoppable(shown: Stage, stage: str) -> Iterator[Progress]:
    with shown(stage) as progress:

        def update(item: str, done: int, total: int) -> None:
            signals.check()
            progress(item, done, total)

        yield update


@contextlib.contextmanager
def _unseen(stage: str) -> Iterator[Progress]:
    del stage
    yield lambda item, done, total: None
