"""Equalizing the channels between two layers, so that one scale per tensor suits them all.

In layer → ReLU → layer, relu(y / s) = relu(y) / s for s > 0: dividing output channel c of the
first kernel and bias by s_c and multiplying input channel c of the second kernel by it changes
nothing in float. With s_c = √(a_c / w_c), where a_c is the greatest activation of the channel and
w_c the greatest weight that it meets in the second layer, both end at √(a_c · w_c).

References:
  Nagel et al., 2019, arXiv:1906.04721, section 4.1; Xiao et al., 2022, arXiv:2211.10438, eq. 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit.streams import Streams, cut, map_batches
from qjax.graph import jaxpr
from qjax.graph.activation import NONE, RELU
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.layers import Movement, Network, Site
from qjax.graph.operation import Linear, by_channel, scale_input_channels
from qjax.programs import program


class Pair(NamedTuple):
    """Positions of two layers with nothing but a ReLU, or nothing at all, between them."""

    first: int
    second: int


def equalizable_pairs(network: Network) -> tuple[Pair, ...]:
    """Finds the pairs of layers whose channels can be equalized.

    The activation between them is a ReLU or none, only the second layer reads it, and the channels
    of the one's output are those of the other's input. No steps of a loop share them.
    """
    readers: dict[jaxpr.Atom, int] = {}
    for equation in network.flat.equations:
        for var in set(jaxpr.variables(equation.invars)):
            readers[var] = readers.get(var, 0) + 1
    for var in jaxpr.variables(network.flat.outputs):
        readers[var] = readers.get(var, 0) + 1
    own = [
        (position, site)
        for position, site in enumerate(network.first_sites)
        if len(network.sites_of(site.layer.name)) == 1
    ]
    inputs = {site.input: (position, site) for position, site in own}
    return tuple(
        Pair(position, inputs[site.activated][0])
        for position, site in own
        if site.activated in inputs
        and readers[site.activated] == 1
        and _matches(site, inputs[site.activated][1])
    )


def _matches(first: Site, second: Site) -> bool:
    axes = tuple(
        axis % len(first.layer.output_shape) for axis in first.layer.operation.channel_axes
    )
    is_homogeneous = first.activation in (RELU, NONE)
    return is_homogeneous and not first.movement and axes == second.layer.operation.input_axes


def equalize(
    network: Network,
    leaves: Sequence[jax.Array],
    folded: Sequence[Folded],
    batches: Sequence[jax.Array],
) -> tuple[Folded, ...]:
    """Rescales the kernels and biases of all equalizable pairs.

    Args:
      network: the network, traced at the size of the batches.
      leaves: the leaves of its params.
      folded: kernel and bias of each layer.
      batches: the leaves of an input, those of all batches stacked.

    Returns:
      Kernels and biases that compute the same network.
    """
    pairs = equalizable_pairs(network)
    magnitudes = _input_magnitudes(network, leaves, folded, batches, {p.second for p in pairs})
    equalized = list(folded)
    for first, second in pairs:
        equalized[first], equalized[second] = _equalize_pair(
            network.first_sites[second].layer.operation,
            equalized[first],
            equalized[second],
            magnitudes[second],
        )
    return tuple(equalized)


def _input_magnitudes(
    network: Network,
    leaves: Sequence[jax.Array],
    folded: Sequence[Folded],
    batches: Sequence[jax.Array],
    wanted: set[int],
) -> dict[int, jax.Array]:
    """The greatest magnitude of each input channel of the wanted layers in the float network."""
    streams = Streams(network, leaves, batches, is_sequential=False)
    positions = {site.layer.name: position for position, site in enumerate(network.first_sites)}
    magnitudes = {}
    for segment in cut(network):
        streams.advance(segment)
        if isinstance(segment.step, Site):
            site = segment.step
            position = positions[site.layer.name]
            x, _ = streams.read(site.input)
            outputs, largest = _evaluated(site.layer.operation, site.movement, folded[position], x)
            if position in wanted:
                magnitudes[position] = largest
            streams.write(site.output, outputs, outputs)
    return magnitudes


@program(static_argnums=(0, 1))
def _evaluated(
    operation: Linear, movement: Movement, folded: Folded, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's output on all batches, and the greatest magnitude of each of its input channels."""
    outputs = map_batches(lambda batch: movement(apply_folded(operation, folded, batch)), x)
    by_batch = jax.vmap(lambda batch: by_channel(operation.input_axes, batch))(jnp.abs(x))
    return outputs, jnp.max(by_batch, axis=(0, 2))


@program(static_argnums=0)
def _equalize_pair(
    operation: Linear, first: Folded, second: Folded, magnitude: jax.Array
) -> tuple[Folded, Folded]:
    groups, patch, channels = operation.matrix_shape
    per_group = len(magnitude) // groups
    kernel = second.kernel.reshape(groups, patch // per_group, per_group, channels)
    weights = jnp.max(jnp.abs(kernel), axis=(1, 3)).reshape(-1)
    is_used = (magnitude > 0) & (weights > 0)
    ratio = jnp.where(is_used, magnitude, 1.0) / jnp.where(is_used, weights, 1.0)
    scale = jnp.sqrt(ratio)
    shape = (first.kernel.shape[0], 1, first.kernel.shape[2])
    return (
        Folded(first.kernel / scale.reshape(shape), first.bias / scale),
        Folded(scale_input_channels(operation, second.kernel, scale), second.bias),
    )
