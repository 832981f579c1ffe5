"""Codebooks fitted to a kernel by k-means, one table for every tensor, channel or group.

A level is the weighted mean of the values that are rounded to it (Lloyd's iteration), and after
rounding by GPTQ or by sweeps the least-squares solution for the codes found. Levels are free: 0 is
one of them only where that is best, as zero padding concerns inputs and never weights.
"""

import dataclasses
from statistics import NormalDist
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import straight_through, usable_scale
from qjax.formats.base import NumberFormat, Spec
from qjax.formats.codebook import WIDTHS, levels_at, nearest_level
from qjax.pytree import pytree

ROUNDS = 30  # of Lloyd's iteration
_RIDGE = 1e-3  # of the mean of the diagonal, toward the table so far
_REFIT_BYTES = 2**27  # what the channels that are refitted at the same time may take


@pytree
@dataclasses.dataclass(frozen=True)
class KMeans:
    """A `Format` whose codes are positions in a table of its own for every scale.

    Attributes:
      levels: float32[groups or 1, patch groups, channels or 1, 2^b], ascending.

    Examples:
      >>> import jax.numpy as jnp
      >>> kmeans = KMeans(jnp.array([[-1.0, 0.0, 0.5, 2.0]]))
      >>> kmeans.bits, kmeans.encode(jnp.array([-3.0])).tolist()
      (2, [0])
      >>> print(kmeans.project(jnp.array([0.7])))
      [0.5]
    """

    levels: jax.Array

    name: ClassVar[str] = "kmeans"
    is_uniform: ClassVar[bool] = False
    lowest: ClassVar[int] = 0
    dtype: ClassVar[Any] = np.dtype(np.uint8)

    @property
    def bits(self) -> int:
        """The width of a code."""
        return (self.levels.shape[-1] - 1).bit_length()

    @property
    def step(self) -> jax.Array:
        """The magnitude of the outermost level."""
        return usable_scale(jnp.max(jnp.abs(self.levels), axis=-1))

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps real values to the positions of the nearest levels."""
        return nearest_level(x, self.levels).astype(self.dtype)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps positions to levels."""
        return levels_at(self.levels, codes)

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to the nearest levels; the gradient passes straight through."""
        return straight_through(self.decode(self.encode(x)), x).astype(x.dtype)

    def scaled(self, factor: jax.Array) -> "KMeans":
        """The format whose every level is `factor` times as large."""
        return KMeans(self.levels * factor[..., None])


def starting_levels(spec: Spec) -> np.ndarray:
    """Where Lloyd's iteration starts: the best table of many levels for a normal distribution.

    Levels of least squared error are as dense as the cube root of the density of the values, which
    for a normal distribution is another one, √3 as wide: its quantiles at (i + ½) / 2^b, divided by
    the largest.

    References:
      Panter and Dite, 1951, Proc. IRE 39, 44-48.
    """
    shares = (np.arange(2**spec.bits) + 0.5) / 2**spec.bits
    levels = np.array([NormalDist().inv_cdf(share) for share in shares])
    return (levels / levels[-1]).astype(np.float32)


def _cover(low: Any, high: Any, spec: Spec, levels: Any) -> KMeans:
    """The starting levels, the outermost as far out as the range."""
    del spec
    largest = usable_scale(jnp.maximum(-low, high).astype(jnp.float32))[..., None]
    return KMeans(largest * jnp.asarray(levels).reshape((1,) * (largest.ndim - 1) + (-1,)))


def lloyd(values: jax.Array, weights: jax.Array, format: KMeans, rounds: int = ROUNDS) -> KMeans:
    """Moves each level to the weighted mean of the values nearest to it, again and again.

    Each round has no greater Σ_k weight_k·(w_k − level(w_k))² than the one before: the nearest
    levels are the best for every value, the means the best for every level. A level that no value
    is nearest to stays.

    Args:
      values: w, float[groups, patch groups, size, channels].
      weights: float[groups, patch groups, size, 1], not negative: E[x_k²] for the error that a
        layer's output shows, 0 for what does not count.
      format: where to start; its levels are shared along axes of size 1.
      rounds: how many.

    Returns:
      The format after the last round.

    References:
      Lloyd, 1982, IEEE Trans. Inf. Theory 28, 129-137.
    """
    shape = format.levels.shape
    tables, count = int(np.prod(shape[:-1])), shape[-1]
    first = jnp.arange(tables, dtype=jnp.int32).reshape(shape[:2] + (1, shape[2])) * count
    weights = jnp.broadcast_to(weights, values.shape)

    def do_round(_: int, levels: jax.Array) -> jax.Array:
        at = first + nearest_level(values, levels[:, :, None])
        total, weighted = (
            jax.ops.segment_sum(terms.ravel(), at.ravel(), tables * count).reshape(shape)
            for terms in (weights, weights * values)
        )
        is_used = total > 0
        return jnp.where(is_used, weighted / jnp.where(is_used, total, 1.0), levels)

    return KMeans(jnp.sort(lax.fori_loop(0, rounds, do_round, format.levels), axis=-1))


def refit(
    values: jax.Array, kernel: jax.Array, metric: jax.Array, format: KMeans
) -> tuple[jax.Array, KMeans]:
    """The levels of least eᵀ H e, e = ŵ − w, with the codes of `values` fixed.

    With Z one-hot, ŵ = Z t for the table t, the change d of the table has
    (Zᵀ H Z + ε) d = −Zᵀ H (Z t − w). Tables of patch groups are taken one after the other, each
    with the others fixed; a table that channels share has the sums over them. ε, a thousandth of
    the mean of the diagonal, holds levels that no code uses; it never makes the error greater.

    Args:
      values: ŵ, levels of the format, float[groups, patch, channels].
      kernel: w, of that shape.
      metric: H, float[groups, patch, patch].
      format: the levels, [groups or 1, patch groups, channels or 1, 2^b].

    Returns:
      The values with the same codes, and their format.
    """
    groups, patch, channels = values.shape
    own_groups, blocks, own_channels, count = format.levels.shape
    size = -(-patch // blocks)
    padding = blocks * size - patch
    columns = [(0, 0), (0, padding), (0, 0)]
    metric = jnp.pad(metric, [*columns[:2], (0, padding)])
    values, kernel = jnp.pad(values, columns), jnp.pad(kernel, columns)
    together = max(1, _REFIT_BYTES // (8 * groups * size * count))

    def do_block(
        p: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        values, levels, gradient = state
        table = lax.dynamic_index_in_dim(levels, p, axis=1)
        rows = lax.dynamic_slice_in_dim(metric, p * size, size, axis=1)
        square = lax.dynamic_slice_in_dim(rows, p * size, size, axis=2)
        old, slope = (
            lax.dynamic_slice_in_dim(a, p * size, size, axis=1) for a in (values, gradient)
        )
        codes = nearest_level(old, table)

        def equations(channel: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            codes, slope = channel  # [groups, size]
            hot = jax.nn.one_hot(codes, count, dtype=jnp.float32)
            weighted = jnp.matmul(square, hot, precision="highest")
            matrix = jnp.matmul(jnp.matrix_transpose(hot), weighted, precision="highest")
            return matrix, jnp.sum(hot * slope[..., None], axis=1)

        by_channel = tuple(jnp.moveaxis(a, 2, 0) for a in (codes, slope))
        found = lax.map(equations, by_channel, batch_size=min(channels, together))
        shared = [0] * (own_channels == 1) + [1] * (own_groups == 1)
        matrix, target = (jnp.sum(a, axis=shared, keepdims=True) for a in found)
        diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
        ridge = _RIDGE * jnp.mean(diagonal, axis=-1) + jnp.finfo(jnp.float32).tiny
        identity = jnp.broadcast_to(jnp.eye(count, dtype=jnp.float32), matrix.shape)
        factor = jax.scipy.linalg.cho_factor(matrix + ridge[..., None, None] * identity, lower=True)
        change = jax.scipy.linalg.cho_solve(factor, -target[..., None])[..., 0]
        changed = table + jnp.moveaxis(change, 0, 1)[:, None]
        new = levels_at(changed, codes)
        moved = jnp.matmul(jnp.matrix_transpose(rows), new - old, precision="highest")
        return (
            lax.dynamic_update_slice_in_dim(values, new, p * size, axis=1),
            lax.dynamic_update_slice_in_dim(levels, jnp.sort(changed, axis=-1), p, axis=1),
            gradient + moved,
        )

    gradient = jnp.matmul(metric, values - kernel, precision="highest")
    state = (values, format.levels, gradient)
    values, levels, _ = lax.fori_loop(0, blocks, do_block, state)
    return values[:, :patch], KMeans(levels)


KMEANS = NumberFormat(
    "kmeans", KMeans, starting_levels, _cover, False, WIDTHS, fit=lloyd, refit=refit
)
