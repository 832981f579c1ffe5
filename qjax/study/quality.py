"""Measuring what quantization did to each layer of a network."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.formats.affine import sqnr_db
from qjax.formats.base import expand_groups
from qjax.formats.binary import Signs
from qjax.formats.dynamic import ActivationFormat
from qjax.graph.activation import Activation
from qjax.graph.layers import Network, Site, find_layers, shapes_of
from qjax.graph.operation import Linear
from qjax.programs import program
from qjax.quantize import Quantized
from qjax.run.layer import QuantizedLayer, fold_input_scales, scaled_kernel
from qjax.run.tap import Tap, float_layers, tapped

BINS = 64  # of the histograms


class Histogram(NamedTuple):
    """How the values of a tensor are distributed, and the range that its codes cover.

    Attributes:
      counts: values per bin.
      low: lower edge of the first bin.
      high: upper edge of the last bin.
      clip: the smallest and the largest representable value; None in float. Of a kernel with a
        scale per channel both values and range are in units of each channel's largest code.
    """

    counts: tuple[int, ...]
    low: float
    high: float
    clip: tuple[float, float] | None


class LayerQuality(NamedTuple):
    """One layer of a quantized network against the float one; SQNR in dB, infinite in float.

    Attributes:
      name: of the layer.
      weights: SQNR of its kernel.
      inputs: SQNR that rounding the float network's input leaves.
      outputs: SQNR that rounding the float network's output leaves, after the activation.
      accumulated: SQNR of its output in the quantized network, after the activation.
      histograms: of the kernel, the input and the output after the activation, in float, by name.
    """

    name: str
    weights: float
    inputs: float
    outputs: float
    accumulated: float
    histograms: Mapping[str, Histogram]


class Quality(NamedTuple):
    """A quantized network against the float one.

    Attributes:
      layers: in dataflow order.
      logits: SQNR of the network's output in dB.
      taps: what flows through the layers of the float network, by name.
      floats: the float network's layers, see `tap.float_layers`.
      network: the traced network.
    """

    layers: tuple[LayerQuality, ...]
    logits: float
    taps: Mapping[str, Tap]
    floats: Mapping[str, Any]
    network: Network


def quality(q: Quantized, params: Any, x: Any) -> Quality:
    """Measures every layer of a quantized network against the float one on the same images.

    Args:
      q: the quantized network.
      params: the float params.
      x: images, as many as fit in memory with all layers' values.

    Returns:
      A `Quality`.
    """
    function = q.apply_fn
    network = find_layers(function.apply_fn, function.params, shapes_of(x))
    floats = float_layers(network, params)
    run = tapped(function.apply_fn, function.params, x)
    expected, given = run(floats, x)
    actual, taken = run(q.params, x)
    layers = [
        _layer_quality(
            site, q.params["layers"][name], floats["layers"][name], given[name], taken[name]
        )
        for site in network.first_sites
        for name in [site.layer.name]
    ]
    return Quality(tuple(layers), float(sqnr_db(expected, actual)), given, floats, network)


def _layer_quality(
    site: Site, layer: QuantizedLayer, exact: QuantizedLayer, given: Tap, taken: Tap
) -> LayerQuality:
    static = site.layer.operation, site.activation.shown, site.activation.is_pointwise
    measured = _measure(*static, layer, exact, given, taken)
    histograms = {
        "weights": _kernel_histogram(layer, measured.kernel),
        "input": _histogram(given.input, _input_format(layer)),
        "output": _histogram(measured.activated, layer.activated or layer.outputs),
    }
    weights, inputs, outputs, accumulated = map(float, measured.decibels)
    return LayerQuality(site.layer.name, weights, inputs, outputs, accumulated, histograms)


class _Measured(NamedTuple):
    """A layer as arrays.

    Attributes:
      decibels: of its kernel, input and output alone, and of its output in the network.
      kernel: in float, in the units of the kernel that was rounded.
      activated: its float output after the activation (before, if its form is unknown).
    """

    decibels: tuple[Any, Any, Any, Any]
    kernel: jax.Array
    activated: jax.Array


@program(static_argnums=(0, 1, 2))
def _measure(
    operation: Linear,
    activation: Activation,
    is_pointwise: bool,
    layer: QuantizedLayer,
    exact: QuantizedLayer,
    given: Tap,
    taken: Tap,
) -> _Measured:
    kernel, x = exact.kernel, given.input
    if layer.grid is not None and layer.folds_input_scales:
        kernel = fold_input_scales(operation, layer.grid, kernel)
    inputs = _input_format(layer)
    x_hat = x if inputs is None else inputs.project(x)
    z_hat = given.output if layer.outputs is None else layer.outputs.project(given.output)
    y, y_hat = (activation.function(z) for z in (given.output, z_hat))
    if layer.activated is not None and is_pointwise:
        y_hat = layer.activated.project(y_hat)
    decibels = (
        math.inf if layer.weights is None else sqnr_db(kernel, scaled_kernel(layer)),
        sqnr_db(x, x_hat),
        sqnr_db(y, y_hat),
        sqnr_db(given.activated, taken.activated),
    )
    return _Measured(decibels, kernel, y)


def _input_format(layer: QuantizedLayer) -> ActivationFormat | None:
    return None if isinstance(layer.inputs, Signs) else layer.inputs


def _kernel_histogram(layer: QuantizedLayer, kernel: jax.Array) -> Histogram:
    if layer.weights is None or not layer.weights.is_uniform:
        return _histogram(kernel, None)
    scale, zero_point = (
        np.asarray(expand_groups(leaf, kernel.shape[1]))
        for leaf in (layer.weights.scale, layer.weights.zero_point)
    )
    qmin, qmax = int(layer.weights.qmin), int(layer.weights.qmax)
    largest = max(abs(qmin), qmax)
    low, high = (float(np.mean(limit - zero_point) / largest) for limit in (qmin, qmax))
    return _counts(np.asarray(kernel) / scale / largest, (low, high))


def _histogram(values: jax.Array, format: ActivationFormat | None) -> Histogram:
    if format is None:
        return _counts(np.asarray(values), None)
    low, high = format.at(values).range
    return _counts(np.asarray(values), (float(low.min()), float(high.max())))


def _counts(values: np.ndarray, clip: tuple[float, float] | None) -> Histogram:
    low, high = (float(edge) for edge in (values.min(), values.max()))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    counts, _ = np.histogram(values, BINS, (low, high))
    return Histogram(tuple(map(int, counts)), low, high, clip)
