"""The state of a search on a disk, so that a run that was killed goes on where it was."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.fingerprint import digest, fingerprint
from qjax.graph.layers import Network
from qjax.kept_arrays import KeptArrays
from qjax.run.stored import by_path, from_paths
from qjax.versions import versions


class KeptState:
    """A file of what a quantized network's scales are now, and of how many steps that took.

    It is read by a run of the same networks, images, settings and versions, and refused by others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        network: Network,
        params: Any,
        quantized: Mapping[str, Any],
        images: str,
        settings: Any,
    ) -> None:
        """Reads what is there; see `KeptArrays`.

        Args:
          folder: of the file.
          name: of the file.
          network: as it was traced.
          params: of the float network.
          quantized: `Quantized.params`, as the run begins.
          images: their SHA-256.
          settings: what else the result depends on, as JSON values.
        """
        about = {
            "function": fingerprint(network.flat),
            "params": digest(params),
            "quantized params": digest(quantized),
            "images": images,
            "settings": settings,
            "versions": versions(),
        }
        self._kept = KeptArrays(folder, name, about)

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
