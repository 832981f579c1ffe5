"""Measuring what quantization did to a network: layers and predictions."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.formats.affine import QParams, fake_quant, sqnr_db
from qjax.graph.layers import Network, Site, find_layers
from qjax.quantize import Quantized
from qjax.run.layer import QuantizedLayer, expand_groups, fold_input_scales, scaled_kernel
from qjax.run.tap import Tap, float_layers, shapes_of, tapped

BINS = 64  # of the histograms
Z95 = 1.959964  # standard deviations that hold 95 % of a normal distribution


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
        for site in network.sites
        for name in [site.layer.name]
    ]
    return Quality(tuple(layers), float(sqnr_db(expected, actual)), given, floats, network)


def _layer_quality(
    site: Site, layer: QuantizedLayer, exact: QuantizedLayer, given: Tap, taken: Tap
) -> LayerQuality:
    kernel = exact.kernel
    if layer.inputs is not None and layer.folds_input_scales:
        kernel = fold_input_scales(site.layer.operation, layer.inputs, kernel)
    weights, kernel_histogram = _kernel_quality(layer, kernel)
    y, y_hat = _rounded_output(site, layer, given)
    outputs = layer.activated or layer.outputs
    histograms = {
        "weights": kernel_histogram,
        "input": _histogram(given.input, layer.inputs),
        "output": _histogram(y, outputs),
    }
    x = given.input
    inputs = math.inf if layer.inputs is None else sqnr_db(x, fake_quant(x, layer.inputs))
    return LayerQuality(
        site.layer.name,
        weights,
        float(inputs),
        float(sqnr_db(y, y_hat)),
        float(sqnr_db(given.activated, taken.activated)),
        histograms,
    )


def _rounded_output(site: Site, layer: QuantizedLayer, given: Tap) -> tuple[jax.Array, jax.Array]:
    """The float output after the activation (before, if its form is unknown), exact and rounded."""
    activate = {"relu": jax.nn.relu, "relu6": jax.nn.relu6}.get(site.layer.activation, lambda y: y)
    y_hat = given.output if layer.outputs is None else fake_quant(given.output, layer.outputs)
    y, y_hat = activate(given.output), activate(y_hat)
    if layer.activated is None or site.layer.activation == "other":
        return y, y_hat
    return y, fake_quant(y_hat, layer.activated)


def _kernel_quality(layer: QuantizedLayer, kernel: jax.Array) -> tuple[float, Histogram]:
    if layer.weights is None:
        return math.inf, _histogram(kernel, None)
    scale = expand_groups(layer.weights.scale, kernel.shape[1])
    zero_point = expand_groups(layer.weights.zero_point, kernel.shape[1])
    largest = max(abs(layer.weights.qmin), layer.weights.qmax)
    relative = np.asarray(kernel / scale) / largest
    low = float(np.mean(np.asarray(layer.weights.qmin - zero_point)) / largest)
    high = float(np.mean(np.asarray(layer.weights.qmax - zero_point)) / largest)
    return float(sqnr_db(kernel, scaled_kernel(layer))), _counts(relative, (low, high))


def _histogram(values: jax.Array, qparams: QParams | None) -> Histogram:
    if qparams is None:
        return _counts(np.asarray(values), None)
    low, high = qparams.range
    return _counts(np.asarray(values), (float(low.min()), float(high.max())))


def _counts(values: np.ndarray, clip: tuple[float, float] | None) -> Histogram:
    low, high = (float(edge) for edge in (values.min(), values.max()))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    counts, _ = np.histogram(values, BINS, (low, high))
    return Histogram(tuple(map(int, counts)), low, high, clip)


def sensitivity(q: Quantized, params: Any, x: Any) -> dict[str, float]:
    """Measures each layer alone: the SQNR of the logits with all other layers in float, in dB.

    The layers are taken as they were fitted in the quantized network.

    Args:
      q: the quantized network.
      params: the float params.
      x: images.

    Returns:
      Decibels by layer; the lowest is the most sensitive.
    """
    function = q.apply_fn
    network = find_layers(function.apply_fn, function.params, shapes_of(x))
    floats = float_layers(network, params)
    run = tapped(function.apply_fn, function.params, x, [])
    expected = run(floats, x)[0]
    found = {}
    for name, layer in q.params["layers"].items():
        alone = {**floats, "layers": {**floats["layers"], name: layer}}
        found[name] = float(sqnr_db(expected, run(alone, x)[0]))
    return found


# ---- Predictions


def predict(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    preprocess: Callable[[Any], Any] | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Evaluates a classifier on all images.

    Args:
      apply_fn: a function of (params, x) that returns logits float[N, classes].
      params: its params.
      images: [N, ...], at least one.
      preprocess: applied to every batch of images first.
      batch_size: images that go through the network together.

    Returns:
      float32[N, classes].
    """
    run = jax.jit(apply_fn)
    total, parts = len(images), []
    size = min(batch_size, total)
    for start in range(0, total, size):
        rows = np.arange(start, start + size) % total
        batch = images[rows] if preprocess is None else preprocess(images[rows])
        parts.append(np.asarray(run(params, batch), np.float32)[: total - start])
    return np.concatenate(parts)


class Comparison(NamedTuple):
    """The predictions of a float and a quantized network; percentages of the images.

    Attributes:
      images: how many there are.
      float_top1: share of right answers of the float network.
      quantized_top1: likewise of the quantized one.
      float_interval: 95 % confidence interval of the former.
      quantized_interval: of the latter.
      difference: quantized less float.
      difference_interval: of that, the images being the same.
      agreement: share of the images where both predict the same class.
      confusion: images by (float prediction, quantized prediction).
      worst: images by how far their logits moved, a changed prediction first.
      float_predictions: class by image.
      quantized_predictions: class by image.
    """

    images: int
    float_top1: float
    quantized_top1: float
    float_interval: tuple[float, float]
    quantized_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    agreement: float
    confusion: np.ndarray
    worst: np.ndarray
    float_predictions: np.ndarray
    quantized_predictions: np.ndarray


def compare(float_logits: np.ndarray, quantized_logits: np.ndarray, labels: Any) -> Comparison:
    """Compares two networks' logits on the same images.

    With b images that only the quantized network gets right and c that only the float one does, the
    difference (b − c) / N has variance (b + c − (b − c)² / N) / N².

    Args:
      float_logits: float[N, classes].
      quantized_logits: float[N, classes].
      labels: int[N].

    Returns:
      A `Comparison`.

    References:
      Wilson, 1927, J. Am. Stat. Assoc. 22, 209–212; McNemar, 1947, Psychometrika 12, 153–157.
    """
    labels = np.asarray(labels)
    total, classes = float_logits.shape
    before, after = float_logits.argmax(-1), quantized_logits.argmax(-1)
    is_right, was_right = after == labels, before == labels
    gained, lost = np.sum(is_right & ~was_right), np.sum(was_right & ~is_right)
    difference = (gained - lost) / total
    deviation = math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (before, after), 1)
    moved = np.square(float_logits - quantized_logits).sum(-1)
    worst = np.lexsort((-moved, before == after))
    return Comparison(
        total,
        100 * float(was_right.mean()),
        100 * float(is_right.mean()),
        wilson_interval(int(was_right.sum()), total),
        wilson_interval(int(is_right.sum()), total),
        100 * float(difference),
        (100 * float(difference - Z95 * deviation), 100 * float(difference + Z95 * deviation)),
        100 * float(np.mean(before == after)),
        confusion,
        worst,
        before,
        after,
    )


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, in percent.

    Args:
      right: successes.
      total: trials, at least 1.

    References:
      Wilson, 1927, J. Am. Stat. Assoc. 22, 209–212.
    """
    share, z2 = right / total, Z95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)
