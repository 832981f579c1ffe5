"""Clipping ranges by grid search, the candidates under `jax.vmap` in chunks of bounded memory.

A range is α·[low, high] of the extremes. A first grid lays α = 1/n, 2/n, … 1; each refinement lays
n candidates between the two neighbours of the best one so far.

The objective of `output_mse` is the mean squared error of the layer's output:

* weights: E‖(ŵ_c − w_c)ᵀ x‖² = (ŵ_c − w_c)ᵀ H (ŵ_c − w_c) per output channel c, with H = E[x xᵀ];
* inputs: E‖W·(x̂ − x)‖²;
* outputs: E‖act(ẑ) − act(z)‖², which sees that a ReLU discards the negative half;
* logits of classes: E‖√softmax(ẑ) − √softmax(z)‖², twice the squared Hellinger distance.

`mse` is the error of the tensor itself, `kl` the divergence of the distribution of its codes from
that of its values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.affine import QParams, affine_qparams, fake_quant, quantize_array
from qjax.formats.spec import QuantSpec

CANDIDATE_BYTES = 2**27  # what the candidates evaluated at the same time may take

TURNS = 3  # of the search between the two ends of a range

HISTOGRAM_BINS = 2048  # of the distributions that `kl` compares

Range = tuple[jax.Array, jax.Array]
Loss = Callable[[jax.Array], jax.Array]


def patch_groups(patch: int, spec: QuantSpec) -> int:
    """How many scales the elements of a patch share among them."""
    return -(-patch // spec.group_size) if spec.granularity == "per_group" else 1


def split_patch(kernel: jax.Array, groups: int) -> jax.Array:
    """Splits the patch axis: [g, patch, m] to [g, groups, size, m], padded with zeros."""
    size = -(-kernel.shape[1] // groups)
    padding = groups * size - kernel.shape[1]
    kernel = jnp.pad(kernel, [(0, 0), (0, padding), (0, 0)])
    return kernel.reshape(kernel.shape[0], groups, size, kernel.shape[2])


def join_patch(blocks: jax.Array, patch: int) -> jax.Array:
    """Undoes `split_patch`: [g, groups, size, m] to [g, patch, m]."""
    return blocks.reshape(blocks.shape[0], -1, blocks.shape[3])[:, :patch]


def diagonal_blocks(hessian: jax.Array, groups: int) -> jax.Array:
    """The blocks on the diagonal: [g, patch, patch] to [g, groups, size, size]."""
    rows = split_patch(hessian, groups)
    columns = split_patch(rows.reshape(-1, *rows.shape[2:]).transpose(0, 2, 1), groups)
    columns = columns.reshape(rows.shape[0], groups, groups, *columns.shape[2:])
    return jnp.moveaxis(jnp.diagonal(columns, axis1=1, axis2=2), -1, 1)


def kernel_loss(error: jax.Array, hessian: jax.Array | None) -> jax.Array:
    """The mean squared output error that a kernel error causes: eᵀ H e per output channel.

    Args:
      error: ŵ − w, float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch]; None stands for the identity.

    Returns:
      float[groups, channels].
    """
    weighted = error if hessian is None else jnp.matmul(hessian, error, precision="highest")
    return jnp.sum(error * weighted, axis=-2)


class Grid(NamedTuple):
    """The candidates of a search.

    Attributes:
      size: n, candidates per pass.
      refinements: passes after the first, around the best candidate so far.
    """

    size: int = 32
    refinements: int = 1


GRID = Grid()


@partial(jax.jit, static_argnames=("spec", "method", "grid"))
def search_weights(
    kernel: jax.Array,
    hessian: jax.Array,
    spec: QuantSpec,
    method: str = "output_mse",
    grid: Grid = GRID,
) -> QParams:
    """Chooses the clipping range of a kernel, for every output channel on its own.

    Per group, the error that a group shares with the others is left out. `kl` chooses one α for the
    whole kernel, each value divided by the largest magnitude of its scale: a channel alone has too
    few values for a histogram.

    Args:
      kernel: float[groups, patch, channels].
      hessian: E[x xᵀ], float[groups, patch, patch]; read by `output_mse` only.
      spec: the number format.
      method: `absmax`, `percentile`, `mse`, `output_mse` or `kl`.
      grid: the candidates.

    Returns:
      Qparams of shape [groups, patch groups, channels], or [1, 1, 1] per tensor.
    """
    count = patch_groups(kernel.shape[1], spec)
    blocks = split_patch(kernel.astype(jnp.float32), count)
    axes = None if spec.granularity == "per_tensor" else 2
    low = jnp.minimum(jnp.min(blocks, axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(blocks, axes, keepdims=True), 0)
    if method == "percentile":
        magnitude = jnp.percentile(jnp.abs(blocks), 99.9, axes, keepdims=True)
        low, high = jnp.maximum(low, -magnitude), jnp.minimum(high, magnitude)
    best = jnp.ones_like(low)
    if method in ("mse", "output_mse"):
        metric = diagonal_blocks(hessian, count) if method == "output_mse" else None

        def loss(alpha: jax.Array) -> jax.Array:
            qparams = affine_qparams(alpha * low, alpha * high, spec)
            losses = kernel_loss(fake_quant(blocks, qparams) - blocks, metric)[:, :, None]
            return jnp.sum(losses, axes, keepdims=True) if axes is None else losses

        best = _search_alpha(loss, low.shape, grid, blocks.nbytes)
    if method == "kl":
        relative = blocks / jnp.maximum(jnp.maximum(-low, high), jnp.finfo(jnp.float32).tiny)
        extremes = relative.min(), relative.max()
        alphas = jnp.arange(1, grid.size + 1, dtype=jnp.float32) / grid.size
        histogram = jnp.histogram(relative, HISTOGRAM_BINS)
        best = alphas[jnp.argmin(entropy_losses(histogram, extremes, spec, alphas))]
    qparams = affine_qparams(best * low, best * high, spec)
    return jax.tree.map(lambda leaf: leaf[:, :, 0], qparams)


def entropy_losses(
    histogram: tuple[jax.Array, jax.Array], extremes: Range, spec: QuantSpec, alphas: jax.Array
) -> jax.Array:
    """Evaluates `entropy_loss` on the ranges α·[low, high].

    Args:
      histogram: (counts [bins], edges float[bins + 1]) of the values.
      extremes: low and high, scalars.
      spec: the number format.
      alphas: float[n].

    Returns:
      float32[n] in nats.
    """
    data = _distribution(*histogram)
    low, high = extremes

    def loss(alpha: jax.Array) -> jax.Array:
        return entropy_loss(data, affine_qparams(alpha * low, alpha * high, spec), None)

    return map_candidates(loss, alphas, data[0].nbytes)


def _search_alpha(
    loss: Loss, shape: tuple[int, ...], grid: Grid, candidate_bytes: int
) -> jax.Array:
    """The α in (0, 1] of least loss, elementwise for α and losses of one `shape`."""
    steps = jnp.arange(1, grid.size + 1, dtype=jnp.float32).reshape(-1, *(1 for _ in shape))

    def search_pass(state: Any, _: None) -> tuple[Any, None]:
        low, width, (best, least) = state
        candidates = jnp.clip(low[None] + width * steps / grid.size, width / grid.size / 2, 1)
        losses = map_candidates(loss, candidates, candidate_bytes)
        position = jnp.argmin(losses, axis=0)[None]
        found, loss_found = (
            jnp.take_along_axis(values, position, axis=0)[0] for values in (candidates, losses)
        )
        best = jnp.where(loss_found < least, found, best)
        step = width / grid.size
        return (best - step, 2 * step, (best, jnp.minimum(least, loss_found))), None

    start = (jnp.zeros(shape), jnp.ones(()), (jnp.ones(shape), jnp.full(shape, jnp.inf)))
    (_, _, (best, _)), _ = lax.scan(search_pass, start, length=grid.refinements + 1)
    return best


def map_candidates(loss: Loss, candidates: jax.Array, candidate_bytes: int) -> jax.Array:
    """Evaluates a loss on every candidate, as many at a time as memory allows.

    Args:
      loss: of one candidate.
      candidates: float[n, ...].
      candidate_bytes: the size of the largest array that one candidate needs.

    Returns:
      The losses, float[n, ...].
    """
    count = len(candidates)
    fitting = max(1, CANDIDATE_BYTES // max(4 * candidate_bytes, 1))
    together = max(d for d in range(1, count + 1) if count % d == 0 and d <= fitting)
    if together == count:
        return jax.vmap(loss)(candidates)
    return lax.map(loss, candidates, batch_size=together)


def search_input(
    patches: jax.Array,
    kernel: jax.Array,
    extremes: Range,
    spec: QuantSpec,
    method: str = "output_mse",
    grid: Grid = GRID,
) -> QParams:
    """Chooses the clipping range of a layer's input.

    Args:
      patches: a sample of the patches that the kernel meets, float[positions, groups, patch].
      kernel: float[groups, patch, channels].
      extremes: the least and the greatest value to represent, scalars.
      spec: the number format.
      method: `mse` (of the patches) or `output_mse` (of kernel times patches).
      grid: the candidates for each end of the range.

    Returns:
      Scalar qparams.
    """
    data = (patches, kernel if method == "output_mse" else None)
    return _search_range(_input_loss, data, extremes, spec, grid, None)


def search_output(
    target: jax.Array,
    actual: jax.Array,
    extremes: Range,
    spec: QuantSpec,
    activation: Callable[[jax.Array], jax.Array],
    grid: Grid = GRID,
    shortcut: jax.Array | None = None,
) -> QParams:
    """Chooses the clipping range of a layer's output: E‖act(q(ẑ) + s) − act(z + s)‖².

    Args:
      target: z, a sample of the outputs to be had, float[n].
      actual: ẑ, the outputs there of the layer to be quantized, float[n].
      extremes: the least and the greatest value to represent, scalars.
      spec: the number format.
      activation: act; the identity for the error of the tensor itself.
      grid: the candidates for each end of the range.
      shortcut: s, what is added to the output before the activation, float[n]; None for 0.

    Returns:
      Scalar qparams.
    """
    added = jnp.zeros(()) if shortcut is None else shortcut
    data = (activation(target + added), actual, added)
    return _search_range(_output_loss, data, extremes, spec, grid, activation)


@partial(jax.jit, static_argnames=("spec", "activation", "grid"))
def search_channels(
    target: jax.Array,
    actual: jax.Array,
    shortcut: jax.Array,
    spec: QuantSpec,
    activation: Callable[[jax.Array], jax.Array],
    grid: Grid = GRID,
) -> QParams:
    """Chooses a clipping range for every channel, as `search_output` does for all of them.

    Args:
      target: z, a sample of the values to be had, float[channels, n].
      actual: ẑ, the values there to be quantized, of that shape.
      shortcut: s, what is added to them, of that shape.
      spec: the number format.
      activation: act.
      grid: the candidates for each end of the range.

    Returns:
      Qparams float32[channels]; a channel of zeros has scale 1.
    """
    extremes = jnp.minimum(actual.min(1), 0), jnp.maximum(actual.max(1), 0)

    def search(channel: tuple[jax.Array, ...]) -> Range:
        *data, lowest, highest = channel
        given = {"spec": spec, "grid": grid, "activation": activation}
        end = partial(_search_end, _output_loss, tuple(data), **given)
        if spec.symmetric:
            return end((lowest, highest), end="both")

        def turn(_: int, ends: Range) -> Range:
            _, high = end((ends[0], highest), end="high")
            low, _ = end((lowest, high), end="low")
            return low, high

        return lax.fori_loop(0, TURNS, turn, (lowest, highest))

    data = activation(target + shortcut), actual, shortcut
    low, high = lax.map(search, (*data, *extremes))
    return affine_qparams(low, high, spec)


def search_logits(
    target: jax.Array, actual: jax.Array, extremes: Range, spec: QuantSpec, grid: Grid = GRID
) -> QParams:
    """Chooses the clipping range of logits: E‖√softmax(q(ẑ)) − √softmax(z)‖².

    Half the divergence KL(softmax(z) ‖ softmax(q(ẑ))) where that is small, but bounded, so that no
    single example decides. Every pair of candidates for the two ends is tried: there are many
    local minima.

    Args:
      target: z, the logits to be had, float[..., classes].
      actual: ẑ, the logits to be quantized, of that shape.
      extremes: the least and the greatest value to represent, scalars.
      spec: the number format.
      grid: its size is the number of candidates for each end of the range.

    Returns:
      Scalar qparams.
    """
    low, high = _nearest_probabilities(target, actual, extremes, spec, grid.size)
    return affine_qparams(low, high, spec)


@partial(jax.jit, static_argnames=("spec", "size"))
def _nearest_probabilities(
    target: jax.Array, actual: jax.Array, extremes: Range, spec: QuantSpec, size: int
) -> Range:
    shares = jnp.arange(size + 1) / size
    low, high = jnp.meshgrid(shares * extremes[0], shares[1:] * extremes[1])
    ranges = jnp.stack([low.ravel(), high.ravel()], axis=1)
    wanted = jnp.sqrt(jax.nn.softmax(target))

    def loss(ends: jax.Array) -> jax.Array:
        found = jnp.sqrt(jax.nn.softmax(fake_quant(actual, affine_qparams(ends[0], ends[1], spec))))
        return jnp.mean(jnp.sum(jnp.square(found - wanted), axis=-1))

    low, high = ranges[jnp.argmin(map_candidates(loss, ranges, actual.nbytes))]
    return low, high


def _input_loss(data: tuple[jax.Array, ...], qparams: QParams, _: None) -> jax.Array:
    patches, kernel = data
    error = fake_quant(patches, qparams) - patches
    if kernel is not None:
        error = jnp.einsum("pgk,gkm->pgm", error, kernel)
    return jnp.mean(jnp.square(error))


def _output_loss(
    data: tuple[jax.Array, ...], qparams: QParams, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    target, actual, added = data
    return jnp.mean(jnp.square(activation(fake_quant(actual, qparams) + added) - target))


def search_entropy(
    histogram: tuple[jax.Array, jax.Array], extremes: Range, spec: QuantSpec, grid: Grid = GRID
) -> QParams:
    """Chooses the clipping range whose codes are distributed most like the values.

    Args:
      histogram: (counts float[bins], edges float[bins + 1]) of the values.
      extremes: the least and the greatest value to represent, scalars.
      spec: the number format.
      grid: the candidates for each end of the range.

    Returns:
      Scalar qparams.

    References:
      Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    data = _distribution(*histogram)
    return _search_range(entropy_loss, data, extremes, spec, grid, None)


def _distribution(counts: jax.Array, edges: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(counts, centers of the bins), with a spike at 0 cut down to the bins beside it.

    0 is exact in every candidate; the many zeros behind a ReLU would outweigh everything else.
    """
    counts = counts.astype(jnp.float32)
    bins = len(counts)
    zero = jnp.clip(jnp.searchsorted(edges, 0.0, side="right") - 1, 0, bins - 1)
    left = jnp.where(zero > 0, counts[zero - 1], 0.0)
    right = jnp.where(zero < bins - 1, counts[jnp.minimum(zero + 1, bins - 1)], 0.0)
    return counts.at[zero].min(jnp.maximum(left, right)), (edges[:-1] + edges[1:]) / 2


def entropy_loss(data: tuple[jax.Array, ...], qparams: QParams, _: None) -> jax.Array:
    """KL(P ‖ Q) = Σ P log(P / Q) between the distributions of clipped values and of their codes.

    P is the histogram inside the range, what lies outside added to its end bins. Q spreads the
    count that a code has inside the range evenly over its bins that are not empty.

    Args:
      data: counts and centers of the bins, float[bins] each.
      qparams: scalars.
      _: not read; `search` passes an activation.

    Returns:
      float32 scalar in nats.
    """
    counts, centers = data
    low, high = qparams.range
    is_inside = (centers >= low) & (centers <= high)
    kept = jnp.where(is_inside, counts, 0.0)
    clipped = jnp.clip(jnp.searchsorted(centers, jnp.stack([low, high])) - jnp.array([0, 1]), 0)
    below, above = (
        jnp.sum(jnp.where(side, counts, 0.0)) for side in (centers < low, centers > high)
    )
    p = kept.at[clipped].add(jnp.stack([below, above]), mode="clip")
    codes = quantize_array(centers, qparams).astype(jnp.int32) - qparams.qmin
    size = qparams.qmax - qparams.qmin + 1
    mass, bins = (
        jax.ops.segment_sum(values, codes, size)[codes]
        for values in (kept, (kept > 0).astype(jnp.float32))
    )
    q = jnp.where(kept > 0, mass / jnp.maximum(bins, 1.0), 0.0)
    p, q = (values / jnp.maximum(jnp.sum(values), 1e-30) for values in (p, q))
    return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-9)), 0.0))


def _search_range(
    loss: Callable[..., jax.Array],
    data: tuple[jax.Array | None, ...],
    extremes: Range,
    spec: QuantSpec,
    grid: Grid,
    activation: Callable[[jax.Array], jax.Array] | None,
) -> QParams:
    """Searches both ends of the range in turns, each for the other one found last.

    A symmetric range is searched as a whole, and one that starts at 0 at its upper end alone.
    """
    search = partial(_search_end, loss, data, spec=spec, grid=grid, activation=activation)
    if spec.symmetric or float(extremes[0]) >= 0:
        low, high = search(extremes, end="both" if spec.symmetric else "high")
        return affine_qparams(low, high, spec)
    low, high = extremes
    for _ in range(TURNS):
        _, high = search((low, extremes[1]), end="high")
        low, _ = search((extremes[0], high), end="low")
    return affine_qparams(low, high, spec)


@partial(jax.jit, static_argnames=("loss", "spec", "grid", "activation", "end"))
def _search_end(
    loss: Callable[..., jax.Array],
    data: tuple[jax.Array | None, ...],
    extremes: Range,
    spec: QuantSpec,
    grid: Grid,
    activation: Callable[[jax.Array], jax.Array] | None,
    end: str,
) -> Range:
    low, high = (jnp.asarray(extreme, jnp.float32) for extreme in extremes)

    def shrunk(alpha: jax.Array) -> Range:
        return (low if end == "high" else alpha * low), (high if end == "low" else alpha * high)

    def loss_at(alpha: jax.Array) -> jax.Array:
        return loss(data, affine_qparams(*shrunk(alpha), spec), activation)

    size = max(leaf.nbytes for leaf in data if leaf is not None)
    return shrunk(_search_alpha(loss_at, (), grid, size))
