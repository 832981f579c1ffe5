"""A trained model on disk: `model.safetensors`, `card.json` for machines, `README.md` to read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load, save

from qjax import atomic

README = """\
# {name}

{family} with {parameters:,} parameters, trained on {dataset}:
**{accuracy:.2f} %** of {test_images:,} held-out images.

| | |
|---|---|
| Trained with | `{command}` |
| Seed, epochs, batch size | {seed}, {epochs}, {batch_size} |
| Training time | {minutes:.0f} min on {device} |
| Input | float32, (pixel / {scale:g} - {mean}) / {std} |
| Selection | none: the averaged weights after the last step |
| sha256 of `model.safetensors` | `{sha256}` |

Made from `card.json`, which holds the whole recipe and the accuracy by epoch.
"""


CARD = "card.json"
_NEEDED = {"sha256", "command", "preprocessing", "architecture", "dataset"}


def write(folder: Path, variables: Any, card: Mapping[str, Any]) -> None:
    """Writes the three files of a model, adding checksum and number of parameters to the card.

    Args:
      folder: made if it does not exist.
      variables: nested dicts of arrays.
      card: JSON-ready.
    """
    leaves: Any = flatten_dict(variables, sep="/")
    weights = save({name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()})
    parameters = sum(leaf.size for name, leaf in leaves.items() if name.startswith("params/"))
    card = {**card, "parameters": parameters, "sha256": hashlib.sha256(weights).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / "model.safetensors", weights)
    atomic.write(folder / CARD, json.dumps(card, indent=1) + "\n")
    atomic.write(folder / "README.md", _readme(card))


def read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Reads the variables and the card of a model.

    Args:
      folder: holds `model.safetensors` and `card.json`.

    Returns:
      The variables as nested dicts of arrays, and the card.

    Raises:
      ValueError: if the card is damaged, or the weights are not the ones that it was written for.
    """
    file = folder / CARD
    try:
        card = json.loads(file.read_text())
        missing = _NEEDED - card.keys()
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}. Fetch it again.") from error
    if missing:
        raise ValueError(
            f"{file} is damaged: it lacks {', '.join(sorted(missing))}. Fetch it again."
        )
    weights = (folder / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != card["sha256"]:
        raise ValueError(
            f"`model.safetensors` in {folder} must have the sha256 {card['sha256']} of its card, "
            f"got {sha256}: the file is damaged or from another training. Fetch it again, or train "
            f"it again with `{card['command']}`."
        )
    return unflatten_dict(load(weights), sep="/"), card


def _readme(card: Mapping[str, Any]) -> str:
    """The model card for people."""
    recipe = card["recipe"]
    return README.format(
        **{k: v for k, v in card.items() if k != "recipe"},
        **{k: recipe[k] for k in ("seed", "epochs", "batch_size")},
        **card["preprocessing"],
        family=card["architecture"]["family"],
        minutes=card["seconds"] / 60,
    )
