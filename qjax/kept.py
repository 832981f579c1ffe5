"""Finished work in a file of JSON lines, so that a run that was killed goes on where it was."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REMEDY = "remove it to start again"


class Kept:
    """Finished work by key; without a file nothing is kept.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     Kept(Path(folder, "rows"), {"model": "a"}).of("8 bits", lambda: 99.1)
      ...     Kept(Path(folder, "rows"), {"model": "a"}).of("8 bits", lambda: 0.0)
      99.1
      99.1
    """

    def __init__(self, file: Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        """Reads what is there.

        Args:
          file: its folder is made if it does not exist.
          about: what the work depends on, as JSON values; it is the first line of the file.

        Raises:
          ValueError: the file is of another run, or damaged.
        """
        self._file, self._found = file, {}
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]  # the last one may be cut off
        if not lines:
            lines = [f"{json.dumps(about)}\n".encode()]
            file.write_bytes(lines[0])
        try:
            first, *others = map(json.loads, lines)
            self._found = dict(others)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`checkpoint` {file} is damaged; {REMEDY}.") from error
        refuse_other_run(file, first, about or {})
        os.truncate(file, sum(map(len, lines)))

    def of(self, key: str, work: Callable[[], Any]) -> Any:
        """What is kept under a key, or what `work` returns: JSON values."""
        if key not in self._found:
            self._found[key] = json.loads(json.dumps(work()))
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(f"{json.dumps([key, self._found[key]])}\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self._found[key]


def refuse_other_run(file: Path, kept: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuses what another run left.

    Args:
      file: that holds it.
      kept: what that run depended on.
      about: what this run depends on.

    Raises:
      ValueError: the message names what differs.
    """
    about = json.loads(json.dumps(about))
    different = [name for name in {**kept, **about} if kept.get(name) != about.get(name)]
    if different:
        raise ValueError(
            f"`checkpoint` {file} is of another run: different {', '.join(different)}. Name "
            f"another folder, or {REMEDY}."
        )
