"""The state of a training run, in memory and on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save

from pretrained.models import describe
from pretrained.recipes import Recipe
from qjax import atomic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one step hands to the next.

    Attributes:
      params: the weights at which gradients are taken.
      velocity: of the momentum, like `params`.
      average: exponential moving average of `params`.
      batch_stats: running statistics of batch norm; {} in a model without.
      step: int32[], steps done.
    """

    params: Any
    velocity: Any
    average: Any
    batch_stats: Any
    step: jax.Array


class Entry(NamedTuple):
    """One line of the log: epochs done, mean loss since the last line, accuracy in %, seconds."""

    epoch: float
    loss: float
    accuracy: float
    seconds: float


class History(NamedTuple):
    """How it went: lines of the log, losses since the last line, seconds over all sessions."""

    log: tuple[Entry, ...] = ()
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


def write(file: Path, recipe: Recipe, state: State, history: History) -> None:
    """Writes `file` whole or not at all."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    leaves = flatten_dict(fields, keep_empty_nodes=True, sep="/")
    tensors = {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf is not empty_node}
    metadata = {
        "recipe": fingerprint(recipe),
        "history": json.dumps(history),
        "empty": json.dumps(sorted(leaves.keys() - tensors.keys())),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, save(tensors, metadata))


def read(file: Path, recipe: Recipe) -> tuple[State, History]:
    """Reads what `write` wrote.

    Raises:
      ValueError: if `file` belongs to another recipe or another version of it.
    """
    with safe_open(file, "np") as f:
        metadata = f.metadata()
        flat = {name: jnp.asarray(f.get_tensor(name)) for name in f.keys()}
    if metadata.get("recipe") != fingerprint(recipe) or "empty" not in metadata:
        raise ValueError(
            f"`state_file` {file} holds another version of the recipe {recipe.name!r}: delete it "
            "(`--restart`) to train from the start, or restore the recipe."
        )
    log, losses, seconds = json.loads(metadata["history"])
    history = History(tuple(Entry(*entry) for entry in log), tuple(losses), seconds)
    flat |= dict.fromkeys(json.loads(metadata["empty"]), empty_node)
    return State(**unflatten_dict(flat, sep="/")), history


def fingerprint(recipe: Recipe) -> str:
    """All that decides the result, as text."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return json.dumps({**fields, "model": recipe.model and describe(recipe.model)}, sort_keys=True)
