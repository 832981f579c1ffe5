"""Tuning of a quantized network without labels: the float network is the teacher.

The float network is not touched and no code of a kernel changes: what learns are the scales of the
quantizer and the biases of its layers (see `qjax.fit.scales`), by the divergence

  T²·KL(softmax(f(x) / T) ‖ softmax(f̂(x) / T))

of the quantized network's output f̂ from the float one's, on views of unlabeled images (see
`qjax.tuning.views`). A quarter of the images, at most 512, is held out: what was learned is kept
only if the divergence does not rise there by more than its standard error, neither on the images
nor on blends of them.
"""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.fit.images import check_finite, gather
from qjax.fit.kept_state import KeptState
from qjax.fit.noise import noise_of
from qjax.fit.scales import Frame, Moving, frame_of, moved, start
from qjax.formats.scales import FREE
from qjax.graph.fingerprint import digest
from qjax.graph.frameworks import check_network
from qjax.graph.layers import Network, shapes_of
from qjax.objectives.divergence import TEMPERATURE, divergence_of_classes
from qjax.progress import Progress
from qjax.quantize import Quantized, reporter
from qjax.report import Report
from qjax.rescaled import rescaled
from qjax.run.fake import FAKE
from qjax.run.function import outputs
from qjax.run.tap import float_layers
from qjax.tuning import adam, views
from qjax.tuning.held_out import EVALUATED, Divergences, HeldOut, rises

_logger = logging.getLogger(__name__)

FILE = "tuning.safetensors"  # in the folder of a checkpoint
STEPS = 400
BATCH = 32
RATE, RATE_OF_FEW_BITS = 2e-3, 3e-3  # above 3 bits; at most 3 bits
FEW_BITS = 3
WARMUP = 20  # steps, at most a tenth of them all
HELD_OUT, LEAST_SHARE = 512, 4  # images at most, and the part of all that they are


class Settings(NamedTuple):
    """How a network is tuned; see `tune`."""

    steps: int = STEPS
    rate: float | None = None
    batch_size: int = BATCH
    temperature: float = TEMPERATURE
    seed: int = 0


class Tuned(NamedTuple):
    """What came of tuning.

    Attributes:
      q: the network, tuned if that helped.
      before: the divergences of the network that was given.
      after: those of what was learned.
      is_kept: whether that is what `q` is.
    """

    q: Quantized
    before: Divergences
    after: Divergences
    is_kept: bool


def tune(
    q: Quantized,
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    *,
    steps: int = STEPS,
    rate: float | None = None,
    batch_size: int = BATCH,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool | Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Quantized:
    """Tunes the scales and biases of a quantized network on unlabeled images.

    Args:
      q: the result of `qjax.quantize`, or a network of `qjax.load`.
      apply_fn: the float network, which gives logits float[N, classes].
      params: its params.
      images: inputs as for `qjax.quantize`; those of the calibration will do.
      steps: of Adam.
      rate: of learning at its peak; by default 0.002, and 0.003 where a layer has activations of 3
        bits or fewer. A cosine takes it down to 0.
      batch_size: images to a step; all that are not held out, if there are fewer.
      temperature: T.
      seed: of the order of the images and of their views.
      mesh: devices to spread a batch over, as many of them as divide it.
      progress: whether to show a progress bar on standard error (needs rich), or a function to
        call with (what is done, steps done, steps).
      checkpoint: a folder for the state; called again with the same arguments after it was killed,
        `tune` goes on there and ends with the same result, bit for bit.

    Returns:
      The tuned network; `q` itself, with a warning, if the divergence rose on the images held out.

    Raises:
      ValueError: the network gives no logits, nothing can be tuned, or an argument is outside of
        its range.
      TypeError: an argument is of another kind than what it should be.

    Examples:
      >>> import qjax
      >>> key = jax.random.key(0)
      >>> params = {"w": jax.random.normal(key, (8, 4))}
      >>> images = jax.random.normal(key, (64, 8))
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> q = qjax.quantize(apply_fn, params, images, bits=3)
      >>> q = tune(q, apply_fn, params, images, steps=30, rate=0.01)
      >>> q.apply_fn(q.params, images).shape, q.params["layers"]["w"].bias.dtype.name
      ((64, 4), 'int32')
    """
    settings = Settings(steps, rate, batch_size, temperature, seed)
    where: dict[str, Any] = {"mesh": mesh, "progress": progress, "checkpoint": checkpoint}
    found = run_tuning(q, apply_fn, params, images, settings, **where)
    if not found.is_kept:
        _logger.warning(
            "tuning is not kept: on images held out the divergence went from %.4g to %.4g, and on "
            "blends of them from %.4g to %.4g; more images or a smaller `rate` may help.",
            *(found.before.plain, found.after.plain),
            *(found.before.blended, found.after.blended),
        )
    return found.q


def run_tuning(
    q: Quantized,
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    settings: Settings,
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool | Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Tuned:
    """Does what `tune` does and says what came of it; the arguments are those of `tune`."""
    _check(q, apply_fn, params, settings)
    images = gather(images, "images")
    check_finite("images", images)
    check_finite("params", params)
    steps, rate, batch_size, temperature, seed = settings
    order = np.random.default_rng(seed).permutation(len(jax.tree.leaves(images)[0]))
    if len(order) < 2:
        raise ValueError("`images` must hold at least 2 images, one to hold out; got 1.")
    count = min(HELD_OUT, max(1, len(order) // LEAST_SHARE))
    held_out, used = (_rows(images, rows) for rows in (order[:count], order[count:]))
    batch = min(batch_size, len(order) - count)
    network = q.apply_fn.network(_rows(used, slice(batch)))
    _check_logits(apply_fn, params, _rows(used, slice(1)))
    frame = frame_of(network, q.params)
    learned = start(frame, q.params)
    if not any(map(jnp.size, jax.tree.leaves(learned))):
        raise ValueError("`q` has no scale and no bias to tune; quantize some of its layers.")
    rate = _default_rate(q) if rate is None else rate
    kept = None
    if checkpoint is not None:
        about = network, params, q.params, digest(images), list(settings)
        kept = KeptState(checkpoint, FILE, *about)
    with reporter(progress, "tuning") as report:
        measured = HeldOut(apply_fn, params, held_out).divergences
        before = measured(q)
        place = _placement(mesh, batch)
        run = _program(network, frame, apply_fn, temperature)
        fixed = place.everywhere((q.params, params))
        state = learned, adam.start(learned)
        done = 0
        if kept is not None:
            done, state = kept.restore(state)
        state = place.everywhere(state)
        for step in range(done, steps):
            report(f"step {step + 1}", step, steps)
            rng = np.random.default_rng((seed, step))
            x = _rows(used, rng.choice(len(order) - count, batch, replace=False))
            view = views.draw(rng, x)
            at = np.float32(step)
            now = adam.learning_rate(rate, steps, min(WARMUP, steps // 10), at)
            state = run(*fixed, state, *place.spread((x, view)), at, np.float32(now))
            jax.block_until_ready(state)
            if kept is not None:
                kept.write(step + 1, state, step + 1 == steps)
        report("", steps, steps)
        learned = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state[0])
        finish = network.program(("moved", frame.key), partial(moved, frame, is_final=True))
        found = q._replace(params=finish(q.params, learned))
        after = measured(found)
        is_kept = not any(map(rises, before, after))
        if is_kept:
            q = found._replace(report=_report(q, found, params, held_out))
    return Tuned(q, before.means, after.means, is_kept)


# ---- A step


def _program(
    network: Network, frame: Frame, apply_fn: Callable[[Any, Any], Any], temperature: float
) -> Callable[..., Any]:
    """The program of a step, found again for networks that are quantized alike."""
    key = "tuning", apply_fn, frame.key, temperature
    return network.program(key, partial(_step, network, frame, apply_fn, temperature))


def _step(
    network: Network,
    frame: Frame,
    apply_fn: Callable[[Any, Any], Any],
    temperature: float,
    quantized: Mapping[str, Any],
    params: Any,
    state: tuple[Moving, adam.State],
    x: Any,
    view: views.View,
    step: jax.Array,
    rate: jax.Array,
) -> tuple[Moving, adam.State]:
    """Takes a step of Adam down the divergence on the views of a batch."""
    learned, moments = state
    seen = views.show(view, x)
    wanted = apply_fn(params, seen)

    def loss(learned: Moving) -> jax.Array:
        current = moved(frame, quantized, learned)
        found = outputs(network, FAKE, current, seen)
        return jnp.mean(divergence_of_classes(wanted, found, temperature))

    return adam.update(learned, jax.grad(loss)(learned), moments, step, rate)


# ---- Images and devices


def _rows(images: Any, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], images)


class _Placement(NamedTuple):
    """Where arrays go: all of them to every device, or a share of a batch to each."""

    everywhere: Callable[[Any], Any]
    spread: Callable[[Any], Any]


def _placement(mesh: jax.sharding.Mesh | None, batch: int) -> _Placement:
    if mesh is None:
        return _Placement(lambda tree: tree, lambda tree: tree)
    used = max(n for n in range(1, mesh.devices.size + 1) if batch % n == 0)
    if used < mesh.devices.size:
        _logger.warning(
            "%d of %d devices are used: batches of %d images do not divide among more.",
            *(used, mesh.devices.size, batch),
        )
    own = jax.sharding.Mesh(mesh.devices.ravel()[:used], "images")
    specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("images")
    shardings = [jax.sharding.NamedSharding(own, spec) for spec in specs]
    return _Placement(*(lambda tree, to=to: jax.device_put(tree, to) for to in shardings))


# ---- What comes out


def _report(before: Quantized, after: Quantized, params: Any, images: Any) -> Report:
    """The report of the tuned network.

    After channels were equalized the float network has other values inside: how far the quantized
    ones are from them is unknown.
    """
    noise = {}
    if not before.report.recipe.equalize:
        size = min(EVALUATED, len(jax.tree.leaves(images)[0]))
        starts = range(0, len(jax.tree.leaves(images)[0]) - size + 1, size)
        batches = [_rows(images, slice(at, at + size)) for at in starts]
        network = after.apply_fn.network(batches[0])
        noise = noise_of(network, float_layers(network, params), after.params, batches)
    return rescaled(before.report, before.params, after.params, noise)


# ---- Arguments


def _default_rate(q: Quantized) -> float:
    widths = [bits for record in q.report for bits in (record.input_bits, record.output_bits)]
    return RATE_OF_FEW_BITS if any(bits and bits <= FEW_BITS for bits in widths) else RATE


def _check(q: Any, apply_fn: Any, params: Any, settings: Settings) -> None:
    if not isinstance(q, Quantized):
        raise TypeError(
            f"`q` must be what qjax.quantize or qjax.load returns; got {type(q).__name__}."
        )
    check_network(apply_fn, params)
    if shapes_of(params) != q.apply_fn.params:
        raise ValueError("`params` must be those of the network that `q` was made of.")
    for name in ("steps", "batch_size"):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1; got {value!r}.")
    for name in ("rate", "temperature"):
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, int | float) and 0 < value < np.inf):
            raise ValueError(f"`{name}` must be a positive number; got {value!r}.")
    recipes = q.report.recipe.by_layer([record.name for record in q.report])
    for name, recipe in recipes.items():
        for field, scales in recipe.scales_not_free.items():
            raise ValueError(
                f"`q` has {field} of layer {name!r} with scales {scales}, which tuning would "
                f"leave; quantize with scale={FREE.name!r}."
            )


def _check_logits(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> None:
    shape = jax.eval_shape(apply_fn, shapes_of(params), shapes_of(x))
    leaves = jax.tree.leaves(shape)
    if len(leaves) != 1 or leaves[0].ndim < 2 or leaves[0].shape[-1] < 2:
        found = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(
            "`apply_fn` must return one array of logits of classes along its last axis, by which "
            f"the quantized network is compared with it; got {found}."
        )
