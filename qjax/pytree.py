"""Dataclasses that are pytrees, and that `jax.export` writes and reads.

An exported function holds the structure of its arguments. Where that has a class of ours, the file
names the class and holds its static fields as JSON; whoever reads the file imports `qjax` first.
"""

import dataclasses
import json
from typing import Any, TypeVar

import jax
import numpy as np
from jax import export

T = TypeVar("T", bound=type)


def pytree(cls: T) -> T:
    """Makes a dataclass a pytree whose structure can be part of an exported function.

    Its static fields (`metadata={"static": True}`) may hold JSON values, tuples of them, NumPy
    types, and dataclasses that have `to_json` and are the declared type of the field.

    Examples:
      >>> @pytree
      ... @dataclasses.dataclass(frozen=True)
      ... class Grid:
      ...     scale: jax.Array
      ...     shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
      >>> exported = export.export(jax.jit(lambda grid: grid.scale.reshape(grid.shape)))
      >>> grid = Grid(jax.numpy.ones(6), (2, 3))
      >>> read = export.deserialize(exported(grid).serialize())
      >>> read.call(grid).shape
      (2, 3)
    """
    fields = [f for f in dataclasses.fields(cls) if f.metadata.get("static")]
    jax.tree_util.register_dataclass(cls)

    def to_bytes(static: tuple[Any, ...]) -> bytes:
        return json.dumps(static, default=_plain).encode()

    def from_bytes(data: bytes) -> tuple[Any, ...]:
        values = json.loads(data)
        return tuple(_restored(f.type, value) for f, value in zip(fields, values, strict=True))

    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"qjax.{cls.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
    )
    return cls


def _plain(value: Any) -> Any:
    """A static value that is no JSON as one that is."""
    return value.to_json() if hasattr(value, "to_json") else {"dtype": np.dtype(value).name}


def _restored(declared: Any, value: Any) -> Any:
    """The inverse of `_plain` for a field of a declared type."""
    if isinstance(value, list):
        return tuple(_restored(None, item) for item in value)
    if not isinstance(value, dict):
        return value
    return np.dtype(value["dtype"]) if "dtype" in value else declared(**value)
