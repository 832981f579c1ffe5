"""The state of tuning on a disk, so that a run that was killed goes on where it was."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.kept_arrays import KeptArrays
from qjax.run.stored import by_path, from_paths

FILE = "tuning.safetensors"


class Checkpoint:
    """The file of a run, which may have been interrupted."""

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        """Reads what is there; see `KeptArrays`."""
        self._kept = KeptArrays(folder, FILE, about)

    def restore(self, state: Any) -> tuple[int, Any]:
        """The steps that are done and the state after them; 0 and `state` if there is no file."""
        if not self._kept.entries:
            return 0, state
        return self._kept.entries["done"], from_paths(state, self._kept.arrays)

    def write(self, done: int, state: Any, is_last: bool) -> None:
        """Writes the state, unless writing would take more than a share of the time."""
        if self._kept.is_due or is_last:
            arrays = {name: np.asarray(array, order="C") for name, array in by_path(state).items()}
            self._kept.write({"done": done}, arrays)
