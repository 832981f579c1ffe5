"""Fitting a kernel anew, in float, to the quantized input that it will meet.

With z the output that is wanted, s what is added to it before the activation, x̂ the layer's
quantized input and ẑ = Wᵀx̂ + b its output, the layer lacks

    r = act(z + s) − (ẑ + s),  or 0 where act(ẑ + s) = act(z + s):

what a ReLU hides is not asked for. (ẑ' + s − (ẑ + s + r))² bounds the error that act shows of any
other output ẑ' from above where r is taken at a ẑ on the same side of the ReLU. So least squares
for r, again and again, find a kernel that is better where it shows:

    H D = Cov[x̂, r] with H = Cov[x̂],  W += D,  b += E[r] − Dᵀ E[x̂].
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit import observers
from qjax.fit.rounding import least_squares_shift
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.operation import Linear

Activation = Callable[[jax.Array], jax.Array]


class Goal(NamedTuple):
    """What the output of a layer is for, on every calibration batch.

    Attributes:
      target: z, the outputs to be had.
      shortcut: s, what is added before the activation; None for 0.
      activation: act, elementwise and not decreasing.
    """

    target: Sequence[jax.Array]
    shortcut: Sequence[jax.Array | None]
    activation: Activation


def lacking(goal: Goal, outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """What outputs lack for the activation to show the target: r, for each batch.

    Args:
      goal: what they are for.
      outputs: ẑ, for each batch.
    """
    batches = zip(goal.target, outputs, goal.shortcut, strict=True)
    return [_lacking(goal.activation, *batch) for batch in batches]


@partial(jax.jit, static_argnums=0)
def _lacking(
    activation: Activation, target: jax.Array, output: jax.Array, shortcut: jax.Array | None
) -> jax.Array:
    added = jnp.zeros_like(output) if shortcut is None else shortcut
    wanted, actual = activation(target + added), output + added
    return jnp.where(wanted == activation(actual), 0.0, wanted - actual)


def refit(
    operation: Linear,
    folded: Folded,
    moments: observers.Moments,
    inputs: Sequence[jax.Array],
    goal: Goal,
    stride: int,
    has_free_bias: bool,
) -> Folded:
    """Changes a kernel, and its bias where that is free, by what the layer lacks.

    Args:
      operation: the linear operation.
      folded: kernel and bias so far.
      moments: of the patches of `inputs`, centered where the bias is free.
      inputs: x̂, for each batch.
      goal: what the output is for.
      stride: between the patches of a batch that count.
      has_free_bias: whether the bias may change.

    Returns:
      The new kernel and bias.
    """
    residuals = lacking(goal, [_apply_folded(operation, folded, batch) for batch in inputs])
    observer = observers.cross_moments(operation, stride)
    found = observers.observe(observer, zip(inputs, residuals, strict=True))
    return _shifted(folded, moments, found, has_free_bias)


_apply_folded = jax.jit(apply_folded, static_argnums=0)


@partial(jax.jit, static_argnums=3)
def _shifted(
    folded: Folded, moments: observers.Moments, found: observers.CrossMoments, has_free_bias: bool
) -> Folded:
    mean = moments.mean[:, :, None]
    means = mean * found.residual_mean[:, None, :] if has_free_bias else 0.0
    shift = least_squares_shift(moments.hessian, found.cross - means)
    offset = found.residual_mean - jnp.sum(mean * shift, axis=1) if has_free_bias else 0.0
    return Folded(folded.kernel + shift, folded.bias + jnp.ravel(offset))
