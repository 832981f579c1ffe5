"""Least squares judged on images that they were not fitted on, and shrunk where images are few.

With few images H = Cov[x̂] and E[x̂ rᵀ] are as much those of the draw as those of all images, and

    (H + (δ₀ + δ)·h·I) D = E[x̂ rᵀ],  h the mean of the diagonal of H, δ₀ its damping

follows the draw. Images are cut into folds, each is held out in turn, and δ is the one for which
the fits D₋ₖ to the others leave the least error in all that were held out:

    e(δ) = Σₖ Eₖ‖r − r̄₋ₖ − D₋ₖᵀ(x̂ − x̄₋ₖ)‖².

Both sides follow from the moments of x̂ and r in each fold: nothing is evaluated again. A
great δ leaves the kernel as it was but for the few directions of x̂ that carry most of its energy.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.fit.moments import map_groups
from qjax.fit.sampling import MOMENT_PATCHES, patch_stride
from qjax.fit.streams import map_batches
from qjax.graph.operation import Linear, output_matrix
from qjax.rounding.metric import damped, least_squares_shift

FEW_IMAGES = 256  # below that many, fits are judged and shrunk
FOLDS = 4
SHRINKAGES = (0.0, 0.1, 1.0, 10.0, 100.0)


class Shrinkage(NamedTuple):
    """How far a fit is to be trusted.

    Attributes:
      extra: δ, the share of the mean of H's diagonal that is added to it.
      overfit: e(0) over the error of the kernel as it was; above 1 a fit that is not shrunk makes
        images worse that it has not seen.
    """

    extra: jax.Array
    overfit: jax.Array


class JointMoments(NamedTuple):
    """Moments of x̂ and r by fold.

    Attributes:
      input_mean: E[x̂], float32[folds, groups, patch].
      residual_mean: E[r], float32[folds, groups, channels].
      hessian: E[x̂ x̂ᵀ], float32[folds, groups, patch, patch].
      cross: E[x̂ rᵀ], float32[folds, groups, patch, channels].
      energy: E[r²], float32[folds, groups, channels].
    """

    input_mean: jax.Array
    residual_mean: jax.Array
    hessian: jax.Array
    cross: jax.Array
    energy: jax.Array


def choose_shrinkage(
    operation: Linear, inputs: jax.Array, residual: jax.Array, has_free_bias: bool
) -> Shrinkage:
    """Chooses how much to shrink the least-squares fit of a kernel to a residual.

    Args:
      operation: the linear operation.
      inputs: x̂, [batches, ...].
      residual: r, what the outputs lack, [batches, ...].
      has_free_bias: whether the bias takes up the means.

    Returns:
      A `Shrinkage`; where a batch has a single patch the greatest one, and an infinite `overfit`.
    """
    stride = patch_stride(operation, inputs, MOMENT_PATCHES)
    of_batch = partial(joint_moments, operation, stride)
    found = map_batches(of_batch, (inputs, residual))
    return shrinkage_of(jax.tree.map(lambda each: each.mean(0), found), has_free_bias)


def shrinkage_of(moments: JointMoments, has_free_bias: bool) -> Shrinkage:
    """What `choose_shrinkage` returns, from the mean of the moments over all batches."""
    if len(moments.energy) < 2:
        return Shrinkage(jnp.float32(SHRINKAGES[-1]), jnp.float32(jnp.inf))
    errors, before = held_out_errors(moments, has_free_bias)
    floor = jnp.finfo(jnp.float32).tiny
    extra = jnp.array(SHRINKAGES, jnp.float32)[jnp.argmin(errors)]
    return Shrinkage(extra, errors[0] / jnp.maximum(before, floor))


def held_out_errors(moments: JointMoments, has_free_bias: bool) -> tuple[jax.Array, jax.Array]:
    """Judges least-squares fits on the fold that each leaves out.

    Args:
      moments: those of two folds or more.
      has_free_bias: whether the bias takes up the means.

    Returns:
      e(δ) of every δ in `SHRINKAGES`, and the error without a change of the kernel.
    """
    shrinkages = jnp.array(SHRINKAGES, jnp.float32)
    totals = jax.tree.map(lambda each: each.sum(0), moments)

    def errors_of_fold(own: JointMoments) -> tuple[jax.Array, jax.Array]:
        count = len(moments.energy) - 1
        others = jax.tree.map(lambda total, each: (total - each) / count, totals, own)
        fitted, judged = others, own
        if has_free_bias:
            fitted, judged = _about_means(others, others), _about_means(others, own)
        errors = lax.map(partial(_error, fitted, judged), shrinkages)
        return errors, jnp.sum(judged.energy)

    errors, before = lax.map(errors_of_fold, moments)
    return errors.sum(0), before.sum(0)


def joint_moments(
    operation: Linear, stride: int, batch: tuple[jax.Array, jax.Array]
) -> JointMoments:
    """The moments of one batch, cut into folds; patches of an image are next to each other.

    Args:
      operation: the linear operation.
      stride: between the patches that count.
      batch: x̂ and r, [examples, ...].
    """
    inputs, residual = batch
    missing = jnp.moveaxis(output_matrix(operation, residual)[::stride], 1, 0)

    def of_group(patches: jax.Array, missing: jax.Array) -> JointMoments:
        folds = min(FOLDS, len(patches))
        count = len(patches) // folds
        parts = [array[: folds * count].reshape(folds, count, -1) for array in (patches, missing)]
        return lax.map(_of_fold, parts)

    _, found = map_groups(of_group, operation, inputs, (missing,), stride)
    return jax.tree.map(lambda each: each.swapaxes(0, 1), found)


def _of_fold(part: list[jax.Array]) -> JointMoments:
    """The moments of one group in one fold."""
    seen, lacking = part
    count = len(seen)
    product = partial(jnp.einsum, "pk,pl->kl", precision=lax.Precision.HIGHEST)
    squares = product(seen, seen) / count, product(seen, lacking) / count
    return JointMoments(seen.mean(0), lacking.mean(0), *squares, jnp.square(lacking).mean(0))


def _about_means(center: JointMoments, moments: JointMoments) -> JointMoments:
    """Moments of one fold about the means of another one in place of zero."""
    c, m = center.input_mean[:, :, None], moments.input_mean[:, :, None]
    c_r, m_r = center.residual_mean[:, None], moments.residual_mean[:, None]
    return JointMoments(
        moments.input_mean - center.input_mean,
        moments.residual_mean - center.residual_mean,
        moments.hessian - m * c.mT - c * m.mT + c * c.mT,
        moments.cross - m * c_r - c * m_r + c * c_r,
        moments.energy + (c_r * (c_r - 2 * m_r))[:, 0],
    )


def _error(fitted: JointMoments, judged: JointMoments, extra: jax.Array) -> jax.Array:
    """E‖r − Dᵀx̂‖² in a fold, D fitted to the others."""
    shift = least_squares_shift(damped(fitted.hessian, extra), fitted.cross)
    explained = 2 * judged.cross - jnp.matmul(judged.hessian, shift, precision="highest")
    return jnp.sum(judged.energy) - jnp.sum(shift * explained)
