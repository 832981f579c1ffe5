"""Files that a command is to write: refused before any work is done, not after it."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from qjax import atomic


def check_file(option: str, path: str | None) -> None:
    """Refuses a file that could not be written, and leaves nothing at its place.

    Args:
      option: that names the file.
      path: of the file; None if the option is not given.

    Raises:
      ValueError: it is a folder or a device, or its folder does not exist or lets nobody write.
    """
    if path is None:
        return
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise OSError("it is a folder" if file.is_dir() else "it is a device")
        probe = atomic.temporary(file.parent) if file.exists() else file
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # a ValueError: a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"`{option}` must name a file that can be written, in an existing folder; got "
            f"{path!r}: {reason}."
        ) from error


def check_apart(paths: Mapping[str, str | None]) -> None:
    """Refuses two outputs at one place, or one inside of the other.

    Args:
      paths: by option; None where it is not given.

    Raises:
      ValueError: the message names both options.
    """
    given = {option: Path(path).resolve() for option, path in paths.items() if path is not None}
    for (one, first), (other, second) in itertools.combinations(given.items(), 2):
        if first == second or first in second.parents or second in first.parents:
            raise ValueError(
                f"`{one}` and `{other}` must name places apart; got {first} and {second}."
            )
