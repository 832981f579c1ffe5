"""Several processes that work together: what all of them know, and who speaks for all.

After `jax.distributed.initialize` each process has devices of its own, and of an array that is
spread over a mesh it may read what lies on these alone. All processes run the same programs in the
same order; what one of them knows goes to the others by collectives.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process writes files and shows progress for all."""
    return jax.process_index() == 0


def is_spread(mesh: Mesh | None) -> bool:
    """Whether the devices of a mesh belong to several processes."""
    return mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1


def check_mesh(mesh: Mesh | None) -> None:
    """Refuses a mesh of some of several processes, or of more devices of one than of another.

    Raises:
      ValueError: the message says how many devices each process has in it.
    """
    if mesh is None or not is_spread(mesh):
        return
    counts = [len(own) for own in devices_by_process(mesh)]
    if len(set(counts)) > 1:
        found = ", ".join(f"{count} of process {i}" for i, count in enumerate(counts))
        raise ValueError(
            "`mesh` over several processes must have as many devices of each of them; got "
            f"{found}. Use jax.make_mesh((jax.device_count(),), ('data',))."
        )


def devices_by_process(mesh: Mesh) -> list[list[Any]]:
    """The devices of a mesh, those of each process together."""
    found: list[list[Any]] = [[] for _ in range(jax.process_count())]
    for device in mesh.devices.flat:
        found[device.process_index].append(device)
    return found


def gathered(values: Any) -> np.ndarray:
    """Small arrays of all processes: [processes, ...]."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def gathered_text(text: str) -> list[str]:
    """Short texts of one length, of all processes."""
    rows = gathered(np.frombuffer(text.encode(), np.uint8))
    return [row.tobytes().decode() for row in rows.reshape(jax.process_count(), -1)]


def together(work: Callable[[], T]) -> T:
    """Does work that may be refused in one process alone; then it is an error in all of them.

    Raises:
      Exception: what `work` raised.
      ValueError: it raised something in another process.
    """
    found, failed = None, None
    try:
        found = work()
    except Exception as error:  # whatever the work raises
        failed = error
    flags = gathered(failed is not None).ravel()
    if failed is not None:
        raise failed
    if flags.any():
        numbers = ", ".join(map(str, np.flatnonzero(flags)))
        raise ValueError(f"process {numbers} of {len(flags)} stopped; its own error says why.")
    return found  # pyright: ignore


def on_every(tree: Any, mesh: Mesh) -> Any:
    """The whole of arrays that are spread over a mesh, as arrays of this process.

    Args:
      tree: a pytree; what is no `jax.Array` stays.
      mesh: the devices that hold its arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    everywhere = NamedSharding(mesh, PartitionSpec())
    run = jax.jit(lambda arrays: arrays, out_shardings=everywhere)
    for number, array in zip(numbers, run([leaves[n] for n in numbers]), strict=True):
        leaves[number] = jnp.asarray(np.asarray(array))
    return jax.tree.unflatten(structure, leaves)


def on_this(tree: Any, mesh: Mesh) -> Any:
    """Arrays that each process has for itself, or all have together, as arrays of this process."""
    leaves, structure = jax.tree.flatten(tree)
    found = [leaf if _is_whole(leaf) else on_every(leaf, mesh) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in found])


def _is_whole(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array)
    return not is_array or leaf.is_fully_addressable or leaf.is_fully_replicated


def assembled(parts: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Adds up what all processes have of arrays, 0 where they have nothing, over a mesh.

    Args:
      parts: a pytree of arrays of one shape in all processes.
      mesh: of one axis, `images`, the devices of a process together.
      spec: how the sums are spread over it.
    """
    grid = mesh.devices.reshape(jax.process_count(), -1)
    own = Mesh(grid, ("processes", "devices"))
    by_process = NamedSharding(own, PartitionSpec("processes"))

    def stacked(part: Any) -> jax.Array:
        shape = (len(grid), *np.shape(part))
        return jax.make_array_from_process_local_data(by_process, np.asarray(part)[None], shape)

    def add(leaf: jax.Array) -> jax.Array:
        return jnp.sum(leaf, 0, dtype=leaf.dtype)

    run = jax.jit(lambda leaves: jax.tree.map(add, leaves), out_shardings=NamedSharding(mesh, spec))
    return run(jax.tree.map(stacked, parts))
