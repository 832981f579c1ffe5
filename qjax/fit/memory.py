"""Where the values between layers are kept, batch by batch.

A store is a function that evaluates another one on every batch and returns what came of it, to be
read a batch at a time: from host memory, from a file that is mapped a batch at a time, or computed
again whenever it is read. Without a store all batches are kept on the device, stacked.
"""

import collections
import dataclasses
import itertools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np


class Stored(Protocol):
    """A value on every batch."""

    def __len__(self) -> int:
        """How many batches there are."""
        ...

    def __getitem__(self, number: int, /) -> jax.Array:
        """The value on one of them, [examples, ...]."""
        ...


Function = Callable[..., Sequence[jax.Array]]
Store = Callable[[Function, Sequence[Stored], int], list[Stored]]


class Memory(NamedTuple):
    """A place for the values between layers.

    Attributes:
      name: what `memory` calls it.
      label: where it is, in a few words.
      store: of (function of the operands on a batch, operands, number of results): its results;
        None where the values of all batches are stacked on the device.
      room: the bytes that are free there.
    """

    name: str
    label: str
    store: Store | None
    room: Callable[[Sequence[Any]], float]


# ---- Host memory


class _Piece(NamedTuple):
    """What one process has of an array.

    Attributes:
      shape: of the whole array.
      sharding: how it is spread over devices.
      parts: the different parts that devices of this process hold.
      places: (device, which part it holds).
    """

    shape: tuple[int, ...]
    sharding: Any
    parts: list[Any]
    places: list[tuple[Any, int]]


def _fetched(array: jax.Array) -> _Piece:
    """Copies an array from the devices of this process."""
    numbers: dict[str, int] = {}
    parts, places = [], []
    for shard in array.addressable_shards:
        number = numbers.setdefault(str(shard.index), len(parts))
        if number == len(parts):
            parts.append(np.asarray(shard.data))
        places.append((shard.device, number))
    return _Piece(array.shape, array.sharding, parts, places)


def _placed(piece: _Piece) -> jax.Array:
    """Brings an array back to where it was."""
    if isinstance(piece.sharding, jax.sharding.SingleDeviceSharding):
        return jnp.asarray(piece.parts[0])
    arrays = [jax.device_put(piece.parts[number], device) for device, number in piece.places]
    return jax.make_array_from_single_device_arrays(piece.shape, piece.sharding, arrays)


class _OnHost:
    """A value in host memory."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    def append(self, array: jax.Array) -> None:
        self._pieces.append(_fetched(array))

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> jax.Array:
        return _placed(self._pieces[number])


# ---- A disk


class _OnDisk:
    """A value in a file without a name, which is gone with the process, whatever ends that."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the value lives)
        weakref.finalize(self, self._file.close)
        self._pieces: list[_Piece] = []

    def append(self, array: jax.Array) -> None:
        piece = _fetched(array)
        self._pieces.append(piece._replace(parts=[self._write(part) for part in piece.parts]))

    def _write(self, part: np.ndarray) -> dict[str, Any]:
        self._file.seek(-self._file.seek(0, os.SEEK_END) % 64, os.SEEK_END)  # aligned
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(part).tobytes())
        self._file.flush()
        return {"dtype": part.dtype, "offset": offset, "shape": part.shape}

    def _read(self, where: dict[str, Any]) -> np.ndarray:
        if not np.prod(where["shape"]):
            return np.zeros(where["shape"], where["dtype"])
        mapped = np.memmap(self._file, mode="r", **where)
        return mapped.reshape(where["shape"])  # without an axis it has one

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> jax.Array:
        piece = self._pieces[number]
        return _placed(piece._replace(parts=[self._read(where) for where in piece.parts]))


def _storing(kind: type[Any]) -> Store:
    """A store that evaluates at once and keeps what comes of it."""

    def store(function: Function, operands: Sequence[Stored], results: int) -> list[Stored]:
        kept = [kind() for _ in range(results)]
        for number in range(len(operands[0])):
            found = function(*batch_of(operands, number))
            for each, array in zip(kept, found, strict=True):
                each.append(array)
        return kept

    return store


# ---- Computed again


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """A function of values; steps are numbered in the order in which they were made."""

    function: Function
    operands: tuple[Stored, ...]
    number: int = dataclasses.field(default_factory=itertools.count().__next__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recomputed:
    """One of the results of a step."""

    step: _Step
    position: int

    def __len__(self) -> int:
        return len(self.step.operands[0])

    def __getitem__(self, number: int) -> jax.Array:
        return batch_of([self], number)[0]


def _recomputing(function: Function, operands: Sequence[Stored], results: int) -> list[Stored]:
    """A store that keeps the function alone."""
    step = _Step(function, tuple(operands))
    return [_Recomputed(step, position) for position in range(results)]


def batch_of(values: Sequence[Stored], number: int) -> list[jax.Array]:
    """What values are on one batch; what several of them are computed from is computed once."""
    steps: dict[int, _Step] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, _Recomputed) and value.step.number not in steps:
            steps[value.step.number] = value.step
            todo += value.step.operands
    last = collections.Counter[int]()  # the step that reads the results of another one last
    for order, step in steps.items():
        for operand in step.operands:
            if isinstance(operand, _Recomputed):
                last[operand.step.number] = max(order, last[operand.step.number])
    kept = {value.step.number for value in values if isinstance(value, _Recomputed)}
    found: dict[int, Sequence[jax.Array]] = {}

    def read(value: Stored) -> jax.Array:
        if isinstance(value, _Recomputed):
            return found[value.step.number][value.position]
        return value[number]

    for order in sorted(steps):
        step = steps[order]
        found[order] = settled(step.function(*map(read, step.operands)))
        for done in [each for each in found if last[each] == order and each not in kept]:
            del found[done]
    return [read(value) for value in values]


T = TypeVar("T")


def settled(values: T) -> T:
    """Waits for values that several devices compute together.

    Their programs wait for each other's parts; on a CPU several of them at once may take all
    threads while none is complete.
    """
    leaves = [leaf for leaf in jax.tree.leaves(values) if isinstance(leaf, jax.Array)]
    if any(len(leaf.sharding.device_set) > 1 for leaf in leaves):
        jax.block_until_ready(leaves)
    return values


# ---- What there is


def _device_room(devices: Sequence[Any]) -> float:
    """What is free on all devices; devices that do not say have the memory of their host."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return _host_room(devices)
    return float(sum(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats))


def _host_room(_: Sequence[Any]) -> float:
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _disk_room(_: Sequence[Any]) -> float:
    return float(shutil.disk_usage(tempfile.gettempdir()).free)


# In the order of time that they cost.
MEMORIES: dict[str, Memory] = {
    memory.name: memory
    for memory in (
        Memory("device", "on the device", None, _device_room),
        Memory("host", "in host memory", _storing(_OnHost), _host_room),
        Memory("disk", "on the disk", _storing(_OnDisk), _disk_room),
        Memory("recompute", "nowhere, computed again", _recomputing, lambda _: float("inf")),
    )
}
