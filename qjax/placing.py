"""How calibration images are cut into batches and brought to the devices."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import hosts
from qjax.fit.checkpoint import Checkpoint
from qjax.fit.estimate import stream_bytes
from qjax.fit.images import Batches, Cut, Images, Shares, images_of
from qjax.fit.memory import Memory
from qjax.graph.layers import Network
from qjax.recipe import Recipe
from qjax.sharing import AXIS

_logger = logging.getLogger(__name__)

BATCH_SIZE = 128  # calibration images that go through the network together, or fewer
BATCH_BYTES = 2**30  # of what fitting on one batch makes of them, by the estimate


def shared_images(batches: Any, is_spread: bool) -> Images:
    """Reads calibration images, those of all processes where several work together."""
    if not is_spread:
        return images_of(batches)
    return Shares(hosts.together(lambda: images_of(batches)))


def cut_of(total: int, most: int | None = None) -> Cut:
    """How images are cut into equal batches.

    No image counts twice: batches are made smaller, down to half, until they hold all images or
    leave the fewest out.

    Args:
      total: images.
      most: of a batch; `BATCH_SIZE` by default.
    """
    least = -(-total // (most or BATCH_SIZE))
    count = min(range(least, 2 * least + 1), key=lambda count: (total % count, count))
    return Cut(count, total // count)


def batch_shapes(images: Images, cut: Cut) -> Any:
    """The shapes of a batch, a pytree of `jax.ShapeDtypeStruct`."""

    def of_batch(image: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cut.size, *image.shape), image.dtype)

    return jax.tree.map(of_batch, images.shapes)


def narrowed(cut: Cut, total: int, network: Network, recipe: Recipe) -> Cut:
    """The same cut, or one of smaller batches where fitting on one takes more than `BATCH_BYTES`.

    Args:
      cut: that the network is traced at.
      total: images.
      network: the network.
      recipe: what to do with it.
    """
    needed = stream_bytes(network, recipe, 1).stacked
    return cut if needed <= BATCH_BYTES else cut_of(total, max(1, cut.size * BATCH_BYTES // needed))


def warn_of_images_left_out(cut: Cut, total: int) -> None:
    """Says how many images no batch holds."""
    used = cut.count * cut.size
    if used < total:
        _logger.warning(
            "%d of %d calibration images are used: batches of equal size hold no more.", used, total
        )


Place = Callable[[Any, int], Any]


def placing(size: int, mesh: jax.sharding.Mesh | None) -> tuple[jax.sharding.Mesh | None, Place]:
    """The devices that share a batch, as many as divide it, and what puts images on them.

    Args:
      size: images of a batch.
      mesh: the devices; None for the default one.

    Returns:
      The devices, and a function of (a pytree of arrays, the axis of its images).
    """
    if mesh is None:
        return None, lambda batch, axis: jax.tree.map(jnp.asarray, batch)
    is_spread = hosts.is_spread(mesh)
    groups = hosts.devices_by_process(mesh) if is_spread else [list(mesh.devices.flat)]
    most = len(groups[0])
    used = max((n for n in range(1, most + 1) if size % (n * len(groups)) == 0), default=0)
    if used < most:
        _logger.warning(
            "%s of %d devices are used: batches of %d images do not divide among more.",
            used * len(groups) or "the work of one",
            mesh.devices.size,
            size,
        )
    chosen = [device for group in groups for device in group[: used or most]]
    own = jax.sharding.Mesh(np.array(chosen), AXIS)

    def place(batch: Any, axis: int) -> Any:
        spec = jax.sharding.PartitionSpec(*[None] * axis, AXIS if used else None)
        if is_spread:
            return hosts.assembled(batch, own, spec)
        return jax.device_put(batch, jax.sharding.NamedSharding(own, spec))

    return own, place


def read(images: Images, cut: Cut, place: Place, memory: Memory) -> list[Any]:
    """The leaves of an input: stacked on the devices, or to be read batch by batch."""
    if memory.store is None:
        parts = list(images.batches(cut.sizes))
        return jax.tree.leaves(place(jax.tree.map(lambda *leaves: np.stack(leaves), *parts), 1))
    leaves = Batches(images, cut, lambda batch: place(batch, 0)).leaves()
    if images.is_in_memory:
        return leaves
    return memory.store(lambda *values: values, leaves, len(leaves))


def checkpoint_of(
    folder: str | os.PathLike[str], about: Mapping[str, Any], is_spread: bool
) -> Checkpoint:
    """The file of a run: one process of several writes it, and all of them read it."""
    if not is_spread:
        return Checkpoint(folder, about)
    found = hosts.together(lambda: Checkpoint(folder, about, hosts.is_first()))
    if len(set(hosts.gathered(found.done).ravel().tolist())) > 1:
        raise ValueError(
            "`checkpoint` must be a folder that all processes see, on a file system that they "
            f"share; in {folder} they find different files."
        )
    return found
