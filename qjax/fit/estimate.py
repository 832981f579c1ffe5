"""How many bytes the values between layers take, from the traced network, before any work."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qjax.fit.memory import MEMORIES, Memory
from qjax.fit.streams import Segment, cut
from qjax.graph import jaxpr
from qjax.graph.junctions import find_junctions
from qjax.graph.layers import Network, Site
from qjax.graph.matmuls import Matmul, find_matmuls
from qjax.graph.schedule import Activated
from qjax.hosts import gathered
from qjax.recipe import Recipe

_logger = logging.getLogger(__name__)

SHARE = 0.5  # of what is free, for the values between layers
OF_A_LAYER = 4  # arrays of the size of a layer's output that fitting it holds beside the streams


class Bytes(NamedTuple):
    """What the values of all images take where it is most.

    Attributes:
      kept: what is live between layers, in both streams.
      stacked: that, and what fitting a layer makes of the values of all batches.
    """

    kept: int
    stacked: int


def stream_bytes(network: Network, recipe: Recipe, batches: int) -> Bytes:
    """The bytes of both streams where they are widest.

    Args:
      network: traced at the size of a batch.
      recipe: what to do with it.
      batches: how many there are.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from qjax.graph.layers import find_layers
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params[0]) @ params[1]
      >>> network = find_layers(apply_fn, [jnp.ones((4, 9)), jnp.ones((9, 2))], jnp.ones((8, 4)))
      >>> stream_bytes(network, Recipe(), batches=10).kept  # 8 times 9 numbers of 4 bytes, twice
      5760
    """
    streams = 2 if recipe.sequential else 1
    junctions = find_junctions(network) if recipe.quantizes_sums else ()
    kept = stacked = 0
    live = set(network.flat.inputs)
    matmuls = find_matmuls(network) if recipe.quantizes_matmuls else ()
    for segment in cut(network, junctions, matmuls):
        live |= {var for equation in segment.equations for var in equation.outvars}
        live &= segment.needed
        found = sum(map(_nbytes, live))
        written = _written(segment)
        live |= {written} if written is not None else set()
        kept = max(kept, found)
        stacked = max(stacked, streams * found + OF_A_LAYER * (_nbytes(written) if written else 0))
    return Bytes(batches * streams * kept, batches * stacked)


def _written(segment: Segment) -> jaxpr.Atom | None:
    match segment.step:
        case Site(output=output) | Matmul(output=output):
            return output
        case Activated(site=site):
            return site.activated
        case _:
            return None


def _nbytes(var: jaxpr.Atom) -> int:
    return math.prod(jaxpr.shape(var)) * jaxpr.dtype(var).itemsize


def choose(
    name: str | None,
    network: Network,
    recipe: Recipe,
    batches: int,
    devices: Sequence[Any],
    processes: int = 1,
) -> Memory:
    """The place for the values between layers, by default the first one where they fit.

    Args:
      name: in `MEMORIES`; None for the default, which is logged: as a warning where it is not the
        device.
      network: traced at the size of a batch.
      recipe: what to do with it.
      batches: how many there are.
      devices: of this process, that compute.
      processes: that share the values evenly, and agree on the place.
    """
    if name is not None:
        return MEMORIES[name]
    found = stream_bytes(network, recipe, batches)

    def fits(memory: Memory) -> bool:
        needed = found.stacked if memory.store is None else found.kept
        return needed / processes <= SHARE * memory.room(devices)

    memories = list(MEMORIES.values())
    number = next(number for number, memory in enumerate(memories) if fits(memory))
    chosen = memories[number if processes == 1 else int(gathered(number).max())]
    is_told = chosen.store is not None
    _logger.log(
        logging.WARNING if is_told else logging.INFO,
        "the values between layers take %.1f GB, %.1f GB with all batches on the device; they are "
        "kept %s (memory=%r).",
        *(found.kept / 1e9, found.stacked / 1e9, chosen.label, chosen.name),
    )
    return chosen


def check_memory(name: str | None) -> None:
    """Refuses a name that is not in `MEMORIES`."""
    if name is not None and name not in MEMORIES:
        raise ValueError(
            f"`memory` must be one of {', '.join(MEMORIES)}, or None for the first one where the "
            f"values fit; got {name!r}."
        )
