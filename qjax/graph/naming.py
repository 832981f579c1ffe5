"""Names of layers: where their kernels live in params."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import jax


def path_names(tree: Any) -> tuple[str, ...]:
    """The path of every leaf of a pytree, its keys joined by "/"."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)


def layer_names(kernels: Sequence[tuple[str, str]], paths: Iterable[str]) -> list[str]:
    """Names layers by the folder of their kernel, or by the whole path where that is ambiguous.

    Args:
      kernels: (path, which element of the array that stands there, such as `[3]`) by layer.
      paths: of all params.

    Examples:
      >>> layer_names([("params/layers/w", "[0]"), ("params/layers/w", "[1]")], ["params/layers/w"])
      ['layers[0]', 'layers[1]']
    """
    trimmed = {path: _trim(path) for path in paths}
    folders = collections.Counter(
        trimmed[path].rpartition("/")[0] for path in dict.fromkeys(path for path, _ in kernels)
    )
    names, seen = [], collections.Counter()
    for path, element in kernels:
        folder = trimmed[path].rpartition("/")[0]
        name = (folder if folder and folders[folder] == 1 else trimmed[path]) + element
        names.append(f"{name}@{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _trim(path: str) -> str:
    keys = path.split("/")
    keys = keys[1:] if keys[0] == "params" and len(keys) > 1 else keys
    keys = keys[:-1] if keys[-1] in ("value", "raw_value") and len(keys) > 1 else keys
    return "/".join(keys)
