"""Fitting a kernel again, in float, to the quantized input that it will meet.

With z the output that is wanted, s what is added to it before the activation, x̂ the layer's
quantized input and ẑ = Wᵀx̂ + b its output, the layer lacks

    r = act(z + s) − (ẑ + s),  or 0 where act(ẑ + s) = act(z + s):

what a ReLU hides is not asked for. (ẑ' + s − (ẑ + s + r))² bounds the error that act shows of any
other output ẑ' from above where r is taken at a ẑ on the same side of the ReLU. So least squares
for r, again and again, find a kernel that is better where it shows:

    H D = Cov[x̂, r] with H = Cov[x̂],  W += D,  b += E[r] − Dᵀ E[x̂].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.fit import moments as m
from qjax.fit.observers import Observer, observe_stacked
from qjax.fit.streams import map_batches
from qjax.graph.activation import Activation
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.operation import Linear, output_matrix
from qjax.rounding.metric import least_squares_shift
from qjax.sharing import shared


class Goal(NamedTuple):
    """What the output of a layer is for, on all calibration batches.

    Attributes:
      target: z, the outputs to be had, [batches, ...].
      shortcut: s, what is added before the activation, of that shape; None for 0.
      activation: act, which clips.
    """

    target: jax.Array
    shortcut: jax.Array | None
    activation: Activation


def lacking(goal: Goal, output: jax.Array) -> jax.Array:
    """What outputs lack for the activation to show the target: r.

    Args:
      goal: what they are for.
      output: ẑ, of the shape of the target.
    """
    added = jnp.zeros_like(output) if goal.shortcut is None else goal.shortcut
    act = goal.activation.function
    wanted, actual = act(goal.target + added), output + added
    return jnp.where(wanted == act(actual), 0.0, wanted - actual)


def residuals(operation: Linear, folded: Folded, inputs: jax.Array, goal: Goal) -> jax.Array:
    """What a layer lacks on all batches: r, of the shape of the target."""

    def missing(batch: tuple[jax.Array, ...]) -> jax.Array:
        x, target, shortcut = batch
        own = goal._replace(target=target, shortcut=shortcut)
        return lacking(own, apply_folded(operation, folded, x))

    return map_batches(missing, (inputs, goal.target, goal.shortcut))


def residual_moments(operation: Linear, stride: int, activation: Activation) -> Observer:
    """The `CrossMoments` of what a layer lacks.

    Args:
      operation: the linear operation.
      stride: between the patches of a batch that count.
      activation: of the goal.

    Returns:
      An observer whose batches are pairs (x̂, what `by_group` returns).
    """

    def residual(
        patches: jax.Array, folded: Folded, target: jax.Array, shortcut: jax.Array | None
    ) -> jax.Array:
        output = jnp.matmul(patches, folded.kernel, precision=lax.Precision.HIGHEST) + folded.bias
        return lacking(Goal(target, shortcut, activation), output)

    return m.cross_moments(operation, stride, residual)


def by_group(
    operation: Linear, folded: Folded, goal: Goal, stride: int
) -> tuple[Folded, jax.Array, jax.Array | None]:
    """Kernel and bias, target and shortcut of a batch at the positions that count, by group."""
    groups, _, channels = operation.matrix_shape

    def there(values: jax.Array) -> jax.Array:
        return jnp.moveaxis(output_matrix(operation, values)[::stride], 1, 0)

    parts = Folded(folded.kernel, folded.bias.reshape(groups, 1, channels))
    return parts, there(goal.target), None if goal.shortcut is None else there(goal.shortcut)


def refit(
    operation: Linear,
    folded: Folded,
    moments: m.Moments,
    inputs: jax.Array,
    goal: Goal,
    stride: int,
    has_free_bias: bool,
    times: int,
) -> Folded:
    """Changes a kernel, and its bias where that is free, by what the layer lacks.

    Args:
      operation: the linear operation.
      folded: kernel and bias so far.
      moments: of the patches of `inputs`, centered where the bias is free.
      inputs: x̂, [batches, ...].
      goal: what the output is for.
      stride: between the patches of a batch that count.
      has_free_bias: whether the bias may change.
      times: how often.

    Returns:
      The new kernel and bias.
    """
    observer = residual_moments(operation, stride, goal.activation)

    def update(_: int, folded: Folded) -> Folded:
        def missing(state: object, batch: tuple[jax.Array, ...]) -> object:
            x, target, shortcut = batch
            own = goal._replace(target=target, shortcut=shortcut)
            return observer.update(state, (x, by_group(operation, folded, own, stride)))

        batches = (inputs, goal.target, goal.shortcut)
        found = observe_stacked(observer._replace(update=missing), batches)
        return shifted(folded, moments, found, has_free_bias)

    return update(0, folded) if times == 1 else lax.fori_loop(0, times, update, folded)


def shifted(
    folded: Folded, moments: m.Moments, found: m.CrossMoments, has_free_bias: bool
) -> Folded:
    """A kernel, and its bias where that is free, changed by the least squares of a residual."""
    mean = moments.mean[:, :, None]
    means = mean * found.residual_mean[:, None, :] if has_free_bias else 0.0
    shift = least_squares_shift(moments.hessian, shared(found.cross - means, 2, is_returned=True))
    offset = found.residual_mean - jnp.sum(mean * shift, axis=1) if has_free_bias else 0.0
    return Folded(folded.kernel + shift, folded.bias + jnp.ravel(offset))
