"""Ranges of the layers that matter most, searched again by the output of the whole network.

A layer's range is chosen by the error of that layer's output. What the network makes of the errors
of the first and of the last layer is another matter: there, scales are multiplied by factors from
a grid, and the one is taken with the least divergence

  T²·KL(softmax(f(x) / T) ‖ softmax(f̂(x) / T)),

f the float network and f̂ the quantized one, on images of the calibration and on blends of them,
0.7·x + 0.3·x'. One scale is searched after the other; what stands before it in the network is
evaluated once, and what comes after it for all factors under `jax.vmap`, as many together as memory
allows. A factor is taken only if the divergence falls on each half of the examples. No gradient and
no label takes part.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.fit.blends import blended_in_pairs
from qjax.fit.kept_state import KeptState
from qjax.fit.scales import Frame, Moving, Place, frame_of, key_of, moved, start
from qjax.fit.search import map_candidates
from qjax.graph.junctions import Junction
from qjax.graph.layers import Network, Site
from qjax.graph.matmuls import Matmul
from qjax.graph.schedule import Activated, Step
from qjax.objectives.divergence import TEMPERATURE, divergence_of_classes
from qjax.programs import FAST_TO_COMPILE
from qjax.progress import Progress
from qjax.run.fake import FAKE
from qjax.run.function import bind, outputs, outputs_of, steps_of
from qjax.run.interpreter import evaluate
from qjax.run.matmul import QuantizedMatmul

FACTORS = (0.6, 0.66, 0.72, 0.78, 0.84, 0.89, 0.94, 1.0, 1.06, 1.12)
TRIED = 0.84  # the factor that tells how much the other layers matter
FILE = "ends.safetensors"  # in the folder of a checkpoint
EXAMPLES = 512  # images, and as many blends of them


class Examples(NamedTuple):
    """What the network is compared on.

    Attributes:
      x: the leaves of an input of one batch.
      wanted: what the float network makes of it.
    """

    x: Any
    wanted: jax.Array


def search_ends(
    network: Network,
    floats: Mapping[str, Any],
    params: Mapping[str, Any],
    batches: Sequence[Any],
    count: int,
    progress: Progress,
    kept: KeptState | None = None,
) -> dict[str, Any]:
    """Searches the scales of the activations of some layers again.

    Args:
      network: traced at the size of a batch.
      floats: the float network, see `qjax.run.tap.float_layers`.
      params: `Quantized.params`.
      batches: the leaves of an input, each to be read batch by batch.
      count: of layers: the first one, the last one, then those that matter most.
      progress: called with (what is searched, how many are done, how many there are).
      kept: the file of the scales that are searched; None for none.

    Returns:
      The params with other scales.

    Raises:
      ValueError: the network does not return logits of classes.
    """
    examples = _examples(network, floats, batches)
    frame = frame_of(network, params)
    moving = start(frame, params)
    names = list(dict.fromkeys(site.layer.name for site in network.first_sites))
    order = list(dict.fromkeys((names[0], names[-1])))
    if count > len(order):
        gains = _gains(network, frame, params, moving, examples[:2])
        others = [name for name in names if name not in order]
        order += sorted(others, key=lambda name: -gains.get(name, 0.0))
    wanted = set(order[:count])
    steps, _ = steps_of(network, params)
    places = [place for place in _in_order(steps, frame) if place[0] in wanted]
    first, moving = (0, moving) if kept is None else kept.restore(moving)
    for done, place in enumerate(places[first:], first):
        progress(f"range of {' of '.join(filter(None, reversed(place)))}", done, len(places))
        position = _position(steps, frame, place)
        search = partial(_divergences, network, frame, position, place)
        run = network.program(("ends", frame.key, place), search, FAST_TO_COMPILE)
        factors = np.log(np.asarray(FACTORS, np.float32))
        losses = [np.asarray(run(params, moving, *each, factors)) for each in examples]
        key = key_of(place)
        change = jnp.float32(factors[_choice(np.concatenate(losses, axis=1))])
        moving = moving._replace(grids={**moving.grids, key: moving.grids[key] + change})
        if kept is not None:
            kept.write(done + 1, moving, done + 1 == len(places))
    finish = network.program(("moved", frame.key), partial(moved, frame, is_final=True))
    return finish(params, moving)


def _choice(losses: np.ndarray) -> int:
    """The factor of least mean loss float[factors, examples] that is better on either half."""
    same = FACTORS.index(1.0)
    gain = losses - losses[same]
    best = int(np.argmin(gain.mean(1)))
    halves = gain[best, ::2].mean(), gain[best, 1::2].mean()
    return best if max(halves) < 0 else same


def _divergences(
    network: Network,
    frame: Frame,
    position: int,
    place: Place,
    params: Mapping[str, Any],
    moving: Moving,
    x: Any,
    wanted: jax.Array,
    changes: jax.Array,
) -> jax.Array:
    """The divergence of every example, float[factors, examples], by changes of one u."""
    steps, read = steps_of(network, moved(frame, params, moving))
    before = bind(network, params, x)
    evaluate(steps[:position], before, read, FAKE)
    key = key_of(place)

    def loss(change: jax.Array) -> jax.Array:
        own = moving._replace(grids={**moving.grids, key: moving.grids[key] + change})
        env = dict(before)
        evaluate(steps[position:], env, steps_of(network, moved(frame, params, own))[1], FAKE)
        found = outputs_of(network, env, FAKE)
        by_class = divergence_of_classes(wanted, found, TEMPERATURE)
        return jnp.mean(jnp.reshape(by_class, (len(by_class), -1)), axis=1)

    largest = max(np.prod(site.layer.output_shape) for site in network.sites)
    return map_candidates(loss, changes, 4 * int(largest))


def _gains(
    network: Network,
    frame: Frame,
    params: Mapping[str, Any],
    moving: Moving,
    examples: Sequence[Examples],
) -> dict[str, float]:
    """By layer, by how much the divergence falls at most if one of its scales is `TRIED`."""
    measure = partial(_divergence, network, frame)
    run = network.program(("end divergence", frame.key), measure, FAST_TO_COMPILE)

    def loss(moving: Moving) -> float:
        return sum(float(run(params, moving, *each)) for each in examples)

    now, found = loss(moving), {}
    for name, field in sorted(set(frame.owners.values())):
        key = key_of((name, field))
        change = jnp.full_like(moving.grids[key], np.log(TRIED))
        gain = now - loss(moving._replace(grids={**moving.grids, key: change}))
        found[name] = max(gain, found.get(name, 0.0))
    return found


def _divergence(
    network: Network,
    frame: Frame,
    params: Mapping[str, Any],
    moving: Moving,
    x: Any,
    wanted: jax.Array,
) -> jax.Array:
    found = outputs(network, FAKE, moved(frame, params, moving), x)
    return jnp.mean(divergence_of_classes(wanted, found, TEMPERATURE))


# ---- Examples


def _examples(
    network: Network, floats: Mapping[str, Any], batches: Sequence[Any]
) -> list[Examples]:
    """Batches of images, each followed by one of blends, with the outputs of the float network."""
    run = network.program("float outputs", partial(outputs, network, FAKE), FAST_TO_COMPILE)
    count, size = len(batches[0]), len(batches[0][0])
    found = []
    for number in range(min(count, -(-EXAMPLES // size))):
        leaves = [leaf[number] for leaf in batches]
        for each in (leaves, blended_in_pairs(leaves)):
            wanted = run(floats, each)
            shape = jnp.shape(wanted) if isinstance(wanted, jax.Array) else ()
            if len(shape) < 2 or shape[-1] < 2:
                raise ValueError(
                    "`end_search` needs a network that returns one array of logits of classes; "
                    "this one returns something else. Quantize with end_search=0."
                )
            found.append(Examples(each, wanted))
    return found


# ---- The order of evaluation


def _in_order(steps: Sequence[Step], frame: Frame) -> list[Place]:
    """The places that own a grid, in the order in which they are used."""
    owners = set(frame.owners.values())
    used = [place for step in steps for place in _places(step)]
    return [place for place in dict.fromkeys(used) if place in owners]


def _places(step: Step) -> tuple[Place, ...]:
    """The places whose grids a step may use."""
    match step:
        case Site(layer=layer):
            return (layer.name, "inputs"), (layer.name, "outputs")
        case Activated(site=site):
            return ((site.layer.name, "activated"),)
        case Junction():
            return ((step.name, ""),)
        case Matmul():
            return tuple((step.name, field) for field in QuantizedMatmul._fields)
        case _:
            return ()


def _position(steps: Sequence[Step], frame: Frame, place: Place) -> int:
    """The first step that uses the grid of a place."""

    def uses(step: Step) -> bool:
        return any(frame.owners.get(used) == place for used in _places(step))

    return next(index for index, step in enumerate(steps) if uses(step))
