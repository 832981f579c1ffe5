"""Errors of the library in the words of the command line: options where it names arguments."""

import argparse
import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping

from qjax.recipe import Recipe, recipe

# Arguments of `qjax.recipe`; what options store under these names is passed to it.
RECIPE = tuple({**inspect.signature(recipe).parameters, **Recipe.__dataclass_fields__})

_DATA = {"params": "the params of `--model`", "batches": "the images of `--dataset`"}
_DATA |= {"apply_fn": "`--model`", "checkpoint": "`--checkpoint`"}
_OTHERWISE = {
    "overrides": "--override",
    "sequential": "--no-sequential",
    "bias_correction": "--no-bias-correction",
}


def flag(argument: str) -> str:
    """The option that gives an argument of the library: `--weight-bits` for weight_bits."""
    return _OTHERWISE.get(argument, f"--{argument.replace('_', '-')}")


def words_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What a command calls the arguments of the library, for `worded`."""
    options = [name for name in RECIPE if name in arguments]
    return _DATA | {name: f"`{flag(name)}`" for name in options}


@contextlib.contextmanager
def worded(words: Mapping[str, str]) -> Iterator[None]:
    """Says an error that leaves the context in other words.

    Args:
      words: by argument, what stands in place of its name and the quotes around it.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        error.args = tuple(_worded(arg, words) for arg in error.args)
        raise


def _worded(text: object, words: Mapping[str, str]) -> object:
    if not isinstance(text, str):
        return text
    return re.sub(r"`(\w+)`", lambda found: words.get(found[1], found[0]), text)
