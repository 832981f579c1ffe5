"""Folding the affine chain of every layer into one kernel and one bias.

With y = W·x and a chain that computes a·y + b per output channel, the layer is W' = a·W, b' = b.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.graph import jaxpr
from qjax.graph.chain import ChannelOperation
from qjax.graph.layers import Network, Site
from qjax.graph.operation import Linear, along_channels


class Folded(NamedTuple):
    """A layer without its chain.

    Attributes:
      kernel: float32[groups, patch, channels], see `qjax.linear`.
      bias: float32[groups * channels].
    """

    kernel: jax.Array
    bias: jax.Array


def fold(network: Network, leaves: Sequence[jax.Array]) -> tuple[Folded, ...]:
    """Computes every layer's kernel and bias from the params.

    Args:
      network: a traced network.
      leaves: the leaves of its params.

    Returns:
      One `Folded` per layer, in dataflow order.
    """
    return network.program("fold", partial(_fold, network))(list(leaves))


def _fold(network: Network, leaves: Sequence[jax.Array]) -> tuple[Folded, ...]:
    flat = network.flat
    sites = network.first_sites
    operands = [site.kernel for site in sites]
    operands += [operation.operand for site in sites for operation in site.operations]
    positions = jaxpr.needed(flat._replace(outputs=tuple(operands)))
    env = flat.constants | dict(zip(flat.params, leaves, strict=True))
    for position in sorted(positions):
        jaxpr.evaluate_equation(flat.equations[position], env)
    return tuple(_fold_site(site, env) for site in sites)


@partial(jax.jit, static_argnums=0)
def apply_folded(operation: Linear, folded: Folded, x: jax.Array) -> jax.Array:
    """Evaluates a layer in float up to its pre-activation output.

    Args:
      operation: its linear operation.
      folded: its kernel and bias.
      x: float[...], its input.

    Returns:
      float32[...], in the shape that the operation gives.
    """
    kernel = operation.from_matrix(folded.kernel)
    y = operation.evaluate(x.astype(jnp.float32), kernel)
    return y + along_channels(operation, folded.bias, y.ndim)


def _fold_site(site: Site, env: jaxpr.Env) -> Folded:
    operation = site.layer.operation
    kernel = operation.to_matrix(jaxpr.read(env, site.kernel)).astype(jnp.float32)
    groups, _, channels = operation.matrix_shape
    slope, bias = slope_and_offset(site.operations, operation, env)
    return Folded(kernel * slope.reshape(groups, 1, channels), bias)


def slope_and_offset(
    operations: Sequence[ChannelOperation], operation: Linear, env: jaxpr.Env
) -> tuple[jax.Array, jax.Array]:
    """What affine operations compute together: a·y + b per output channel.

    Args:
      operations: one after the other.
      operation: the linear operation that they follow.
      env: the values of their operands.

    Returns:
      (a, b), float32[groups * channels] each.
    """
    slope = jnp.ones(math.prod(operation.channel_sizes), jnp.float32)
    bias = jnp.zeros_like(slope)
    for step in operations:
        operand = _per_channel(step, jaxpr.read(env, step.operand), operation)
        match step.primitive, step.is_reversed:
            case "add", _:
                bias = bias + operand
            case "sub", False:
                bias = bias - operand
            case "sub", True:
                slope, bias = -slope, operand - bias
            case "mul", _:
                slope, bias = slope * operand, bias * operand
            case "div", _:
                slope, bias = slope / operand, bias / operand
    return slope, bias


def _per_channel(step: ChannelOperation, operand: jax.Array, operation: Linear) -> jax.Array:
    """Brings the operand of an affine operation to float32[output channels]."""
    shape = [1] * step.ndim
    for axis, size in zip(step.axes, jnp.shape(operand), strict=True):
        shape[axis] = size
    own = [shape[axis] for axis in step.channel_axes]
    order = sorted(range(len(own)), key=step.channel_axes.__getitem__)
    inverse = sorted(range(len(own)), key=order.__getitem__)
    vector = jnp.reshape(operand, [own[i] for i in order]).transpose(inverse)
    sizes = operation.channel_sizes
    assert math.prod(sizes) == operation.matrix_shape[0] * operation.matrix_shape[2]
    return jnp.broadcast_to(vector, sizes).reshape(-1).astype(jnp.float32)
