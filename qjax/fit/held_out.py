"""Least squares judged on images that they were not fitted on, and shrunk where images are few.

With few images H = Cov[x̂] and E[x̂ rᵀ] are as much those of the draw as those of all images, and

    (H + (δ₀ + δ)·h·I) D = E[x̂ rᵀ],  h the mean of the diagonal of H, δ₀ its damping

follows the draw. Images are cut into folds, each is held out in turn, and δ is the one for which
the fits D₋ₖ to the others leave the least error in all that were held out:

    e(δ) = Σₖ Eₖ‖r − r̄₋ₖ − D₋ₖᵀ(x̂ − x̄₋ₖ)‖².

Both sides follow from the second moments of (x̂, r) in each fold: nothing is evaluated again. A
great δ leaves the kernel as it was but for the few directions of x̂ that carry most of its energy.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
    """Moments of v = (x̂, r) by fold.

    Attributes:
      mean: E[v], float32[folds, groups, patch + channels].
      square: E[v vᵀ], float32[folds, groups, patch + channels, patch + channels].
    """

    mean: jax.Array
    square: jax.Array


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
    found = JointMoments(*(x.mean(0) for x in map_batches(of_batch, (inputs, residual))))
    return shrinkage_of(operation, found, has_free_bias)


def shrinkage_of(operation: Linear, moments: JointMoments, has_free_bias: bool) -> Shrinkage:
    """What `choose_shrinkage` returns, from the mean of the moments over all batches."""
    if len(moments.mean) < 2:
        return Shrinkage(jnp.float32(SHRINKAGES[-1]), jnp.float32(jnp.inf))
    errors, before = held_out_errors(operation, moments, has_free_bias)
    floor = jnp.finfo(jnp.float32).tiny
    extra = jnp.array(SHRINKAGES, jnp.float32)[jnp.argmin(errors)]
    return Shrinkage(extra, errors[0] / jnp.maximum(before, floor))


def held_out_errors(
    operation: Linear, joint: JointMoments, has_free_bias: bool
) -> tuple[jax.Array, jax.Array]:
    """Judges least-squares fits on the fold that each leaves out.

    Args:
      operation: the linear operation.
      joint: the moments of two folds or more.
      has_free_bias: whether the bias takes up the means.

    Returns:
      e(δ) of every δ in `SHRINKAGES`, and the error without a change of the kernel.
    """
    means, moments = joint
    folds, shrinkages = len(means), jnp.array(SHRINKAGES, jnp.float32)

    def errors_of_fold(own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mean, moment = own
        mean_of_others = (means.sum(0) - mean) / (folds - 1)
        center = mean_of_others if has_free_bias else jnp.zeros_like(mean)
        fitted = _about(center, mean_of_others, (moments.sum(0) - moment) / (folds - 1))
        judged = _about(center, mean, moment)
        errors = lax.map(partial(_error, operation, fitted, judged), shrinkages)
        return errors, _energy(operation, judged)

    errors, before = lax.map(errors_of_fold, (means, moments))
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
    patches = operation.patches(inputs.astype(jnp.float32), stride)
    missing = output_matrix(operation, residual)[::stride]
    joint = jnp.concatenate([patches, missing], axis=2)
    folds = min(FOLDS, len(joint))
    count = len(joint) // folds
    parts = joint[: folds * count].reshape(folds, count, *joint.shape[1:])
    product = partial(jnp.einsum, "pgk,pgl->gkl", precision=lax.Precision.HIGHEST)
    return JointMoments(parts.mean(1), lax.map(lambda part: product(part, part) / count, parts))


def _about(center: jax.Array, mean: jax.Array, moment: jax.Array) -> jax.Array:
    """E[(v − c)(v − c)ᵀ] from E[v] and E[v vᵀ]."""
    mixed = mean[:, :, None] * center[:, None]
    return moment - mixed - jnp.matrix_transpose(mixed) + center[:, :, None] * center[:, None]


def _error(operation: Linear, fitted: jax.Array, judged: jax.Array, extra: jax.Array) -> jax.Array:
    """E‖r − Dᵀx̂‖² under the second moments of a fold, D fitted to those of the others."""
    patch = operation.matrix_shape[1]
    hessian, cross = fitted[:, :patch, :patch], fitted[:, :patch, patch:]
    shift = least_squares_shift(damped(hessian, extra), cross)
    own, own_cross = judged[:, :patch, :patch], judged[:, :patch, patch:]
    explained = 2 * own_cross - jnp.matmul(own, shift, precision="highest")
    return _energy(operation, judged) - jnp.sum(shift * explained)


def _energy(operation: Linear, judged: jax.Array) -> jax.Array:
    """E‖r‖² under second moments."""
    patch = operation.matrix_shape[1]
    return jnp.sum(jnp.trace(judged[:, patch:, patch:], axis1=1, axis2=2))
