"""The state of tuning on a disk, so that a run that was killed goes on where it was.

One file holds it, and what it belongs to: it is replaced whole, read by a run of the same network,
images and settings, and refused by any other.
"""

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
from qjax.run.stored import by_path, from_paths

FILE = "tuning.safetensors"
PAUSE = 20.0  # seconds of work for every second of writing, before the state is written again


class Checkpoint:
    """The file of a run, which may have been interrupted."""

    def __init__(self, folder: str | os.PathLike, about: Mapping[str, Any]) -> None:
        """Reads what is there.

        Args:
          folder: made if it does not exist.
          about: what the run depends on, as JSON values.

        Raises:
          ValueError: the file there is of another run, or damaged.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`checkpoint` must be a folder; {folder} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._about = folder / FILE, about
        self._done, self._arrays = self._read() if self._file.exists() else (0, {})
        self._is_due_at = -np.inf

    def _read(self) -> tuple[int, dict[str, np.ndarray]]:
        try:
            with safe_open(self._file, "np") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}
            entries = json.loads(metadata["entries"])
            is_whole = metadata["sha256"] == _digest(metadata["entries"], arrays)
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            message = f"`checkpoint` {self._file} is damaged ({error}); {REMEDY}."
            raise ValueError(message) from error
        if not is_whole:
            raise ValueError(f"`checkpoint` {self._file} is damaged; {REMEDY}.")
        refuse_other_run(self._file, entries["about"], self._about)
        return entries["done"], arrays

    def restore(self, state: Any) -> tuple[int, Any]:
        """The steps that are done and the state after them; 0 and `state` if there is no file."""
        return (self._done, from_paths(state, self._arrays)) if self._arrays else (0, state)

    def write(self, done: int, state: Any, is_last: bool) -> None:
        """Writes the state, unless writing would take more than a share of the time."""
        start = time.monotonic()
        if start < self._is_due_at and not is_last:
            return
        arrays = {name: np.asarray(array, order="C") for name, array in by_path(state).items()}
        text = json.dumps({"about": self._about, "done": done})
        atomic.write(self._file, save(arrays, {"entries": text, "sha256": _digest(text, arrays)}))
        now = time.monotonic()
        self._is_due_at = now + PAUSE * (now - start)


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(arrays[name].tobytes())
    return found.hexdigest()
