"""Fields of dataclasses whose values have the types that they are declared with."""

import functools
import numbers
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

_NUMBERS = {int: numbers.Integral, float: numbers.Real}
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def check_fields(value: Any, names: Sequence[str] | None = None) -> None:
    """Refuses a dataclass whose fields hold what they are not declared for.

    Args:
      value: of the dataclass.
      names: of the fields; by default all of them.

    Raises:
      ValueError: the message names the field.

    Examples:
      >>> import dataclasses
      >>> @dataclasses.dataclass
      ... class Shape:
      ...     sizes: tuple[int, ...]
      ...     name: str | None
      >>> check_fields(Shape((2, 3), None))
      >>> check_fields(Shape((2, 1.5), None))
      Traceback (most recent call last):
      ValueError: `sizes` must be a tuple of an integer; got (2, 1.5).
    """
    hints = _hints(type(value))
    for name in names or [name for name in hints if hasattr(value, name)]:
        found = getattr(value, name)
        if not _fits(found, hints[name]):
            raise ValueError(f"`{name}` must be {_words(hints[name])}; got {found!r:.100}.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    items = get_args(hint)
    match get_origin(hint) or hint:
        case origin if origin in (Union, types.UnionType):
            return any(_fits(value, item) for item in items)
        case origin if origin is Literal:
            return value in items
        case origin if origin is tuple:
            if not isinstance(value, tuple):
                return False
            hints = items[:1] * len(value) if items[-1] is Ellipsis else items
            return len(value) == len(hints) and all(map(_fits, value, hints))
        case origin if origin in _NUMBERS:
            return isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
        case origin if origin is bool:
            return isinstance(value, bool | np.bool_)
        case origin:
            return isinstance(value, origin)


def _words(hint: Any) -> str:
    items = get_args(hint)
    match get_origin(hint) or hint:
        case origin if origin in (Union, types.UnionType):
            return " or ".join(map(_words, items))
        case origin if origin is Literal:
            return " or ".join(map(repr, items))
        case origin if origin is tuple:
            return f"a tuple of {_words(items[0])}"
        case types.NoneType:
            return "None"
        case origin:
            return _NAMES.get(origin, f"a {origin.__name__}")
