"""Arrays of an interrupted run in one file, with what they belong to."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qjax import atomic
from qjax.kept import REMEDY, refuse_other_run

PAUSE = 20.0  # seconds of work for every second of writing, before the file is written again


class KeptArrays:
    """The file: replaced whole, read by a run of the same kind, and refused by any other.

    Attributes:
      entries: what was written with the arrays, as JSON values; empty where there is no file.
      arrays: by name.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, about: Mapping[str, Any]) -> None:
        """Reads what is there, and removes what a killed process left half-written.

        Args:
          folder: made if it does not exist.
          name: of the file.
          about: what the run depends on, as JSON values.

        Raises:
          ValueError: the file there is of another run, or damaged.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`checkpoint` must be a folder; {folder} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if atomic.TEMPORARY.fullmatch(entry.name):
                entry.unlink(missing_ok=True)
        self._file, self._about = folder / name, about
        self.entries: dict[str, Any] = {}
        self.arrays: dict[str, np.ndarray] = {}
        if self._file.exists():
            self.entries, self.arrays = self._read()
        self._is_due_at = -np.inf

    def _read(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            with safe_open(self._file, "np") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}
            entries = json.loads(metadata["entries"])
            is_whole = metadata["sha256"] == _digest(metadata["entries"], arrays)
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            raise self.damaged(f" ({error})") from error
        if not is_whole:
            raise self.damaged()
        refuse_other_run(self._file, entries["about"], self._about)
        return entries, arrays

    def damaged(self, reason: str = "") -> ValueError:
        """The error about a file that holds something else than what was written."""
        return ValueError(f"`checkpoint` {self._file} is damaged{reason}; {REMEDY}.")

    @property
    def is_due(self) -> bool:
        """Whether writing now takes no more than a share of the time."""
        return time.monotonic() >= self._is_due_at

    def write(self, entries: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Replaces the file.

        Args:
          entries: JSON values.
          arrays: by name, of types that safetensors has.
        """
        start = time.monotonic()
        text = json.dumps({"about": self._about, **entries})
        stored = dict(arrays)
        atomic.write(self._file, save(stored, {"entries": text, "sha256": _digest(text, stored)}))
        now = time.monotonic()
        self._is_due_at = now + PAUSE * (now - start)


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(arrays[name].tobytes())
    return found.hexdigest()
