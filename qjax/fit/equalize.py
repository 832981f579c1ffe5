"""Equalizing the channels between two layers, so that one scale per tensor suits them all.

In layer → ReLU → layer, relu(y / s) = relu(y) / s for s > 0: dividing output channel c of the
first kernel and bias by s_c and multiplying input channel c of the second kernel by it changes
nothing in float. With s_c = √(a_c / w_c), where a_c is the greatest activation of the channel and
w_c the greatest weight that it meets in the second layer, both end at √(a_c · w_c).

References:
  Nagel et al., 2019, arXiv:1906.04721, section 4.1; Xiao et al., 2022, arXiv:2211.10438, eq. 4.
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.fit.ahead import float_outputs
from qjax.fit.batch_streams import BatchStreams
from qjax.fit.streams import Streams, cut
from qjax.graph import jaxpr
from qjax.graph.activation import NONE, RELU
from qjax.graph.fold import Folded
from qjax.graph.layers import Network, Site
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
    folded: Sequence[Folded],
    streams: Streams | BatchStreams,
) -> tuple[Folded, ...]:
    """Rescales the kernels and biases of all equalizable pairs.

    Args:
      network: the network, traced at the size of the batches.
      folded: kernel and bias of each layer.
      streams: the float network's values, at its input.

    Returns:
      Kernels and biases that compute the same network.
    """
    pairs = equalizable_pairs(network)
    magnitudes = _input_magnitudes(network, folded, streams, {p.second for p in pairs})
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
    folded: Sequence[Folded],
    streams: Streams | BatchStreams,
    wanted: set[int],
) -> dict[int, jax.Array]:
    """The greatest magnitude of each input channel of the wanted layers in the float network."""
    positions = {site.layer.name: position for position, site in enumerate(network.first_sites)}
    magnitudes = {}
    for segment in cut(network):
        streams.advance(segment)
        if isinstance(segment.step, Site):
            site = segment.step
            position = positions[site.layer.name]
            operation = site.layer.operation
            if position in wanted:
                x, _ = streams.stored(site.input)
                found = [_magnitudes(operation, x[number]) for number in range(len(x))]
                magnitudes[position] = functools.reduce(jnp.maximum, found)
            run = partial(float_outputs, operation, site.movement, folded[position])
            streams.apply(site.output, run, run, site.input)
    return magnitudes


@program(static_argnums=0)
def _magnitudes(operation: Linear, x: jax.Array) -> jax.Array:
    """The greatest magnitude of each channel of a layer's input."""
    return jnp.max(by_channel(operation.input_axes, jnp.abs(x)), axis=1)


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
