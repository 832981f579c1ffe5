"""A network of the user's own, made by a function of theirs: `package.module:function`."""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_NAME = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")


class OwnModel(NamedTuple):
    """What the function returned.

    Attributes:
      apply_fn: a pure function of (params, x).
      params: pytree of arrays.
      preprocess: maps uint8[N, H, W, C] to the network's input.
    """

    apply_fn: Callable[..., Any]
    params: Any
    preprocess: Callable[[Any], Any]


def is_own(name: str) -> bool:
    """Whether a name is of the form `package.module:function`."""
    return _NAME.fullmatch(name) is not None


def load(name: str) -> OwnModel:
    """Calls a function that makes a network.

    Args:
      name: `package.module:function`; the module is looked for in the current folder too. The
        function takes nothing and returns (apply_fn, params) or (apply_fn, params, preprocess);
        without `preprocess` the input is pixel / 255.

    Raises:
      ValueError: there is no such module or function, or it returns something else.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"`name` must be of the form package.module:function; got {name!r}.")
    with _current_folder():
        try:
            module = importlib.import_module(parts["module"])
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{name}: {error}. The current folder and the installed packages were searched."
            ) from error
    function = getattr(module, parts["function"], None)
    if not callable(function):
        raise ValueError(f"{name}: {module.__name__} has no function {parts['function']!r}.")
    made = function()
    if not (isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0])):
        kinds = [type(x).__name__ for x in made] if isinstance(made, tuple) else type(made).__name__
        raise ValueError(
            f"{name} must return (apply_fn, params) or (apply_fn, params, preprocess); it returned "
            f"{kinds}."
        )
    return OwnModel(*made) if len(made) == 3 else OwnModel(*made, preprocess=shares_of_white)


def shares_of_white(images: jax.Array | np.ndarray) -> jax.Array:
    """Maps pixels 0 to 255 to 0 to 1."""
    return jnp.asarray(images, jnp.float32) / 255


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Makes modules in the current folder importable while the context is open."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
