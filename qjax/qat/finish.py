"""From a trained network to a `Quantized` that everything else takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.fit.layer import Fit, energies
from qjax.formats.affine import sqnr_db
from qjax.formats.base import elementwise
from qjax.formats.binary import Signs
from qjax.graph.layers import Site
from qjax.graph.operation import Linear
from qjax.qat.function import STEPS, Frame, TrainableFunction
from qjax.qat.kernels import Params
from qjax.quantize import Quantized
from qjax.report import Report, layer_report
from qjax.run.layer import QuantizedLayer, with_bias
from qjax.run.tap import Tap, tapped


def finish(apply_fn: TrainableFunction, params: Mapping[str, Any], x: Any) -> Quantized:
    """Turns a trained network into a quantized one: codes, steps and integer biases.

    Args:
      apply_fn: what `prepare` returned.
      params: its params, trained.
      x: inputs to report each layer's error on, against the network with its latent float kernels.

    Returns:
      A `Quantized`, which computes what the trained network computes, up to the rounding of biases.

    Raises:
      ValueError: a param is NaN or infinite.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(
                f"`params` must be finite; {jax.tree_util.keystr(path)} holds NaN or infinity. "
                "Train with a lower learning rate."
            )
    network = apply_fn.function.network(x)
    layers: dict[str, QuantizedLayer] = {}
    for site in network.first_sites:
        name = site.layer.name
        frame = apply_fn.frames[name]
        layers[name] = _finish(site.layer.operation, frame, params["layers"][name], layers)
    latent = {
        name: QuantizedLayer(layer["kernel"], layer["bias"], None, None, None, None)
        for name, layer in params["layers"].items()
    }
    rest = {**params["rest"], **apply_fn.constants}
    quantized = {"layers": layers, "rest": rest}
    function = apply_fn.function
    run = tapped(function.apply_fn, function.params, x)
    taps = run({"layers": latent, "rest": rest}, x)[1], run(quantized, x)[1]
    records = [
        layer_report(site.layer, _fit(site, params["layers"], layers, *taps))
        for site in network.first_sites
    ]
    recipe = dataclasses.replace(apply_fn.recipe, sequential=True)  # the layers are one network
    return Quantized(function, quantized, Report(records, recipe, network.skipped))


def _finish(
    operation: Linear, frame: Frame, params: Params, finished: Mapping[str, QuantizedLayer]
) -> QuantizedLayer:
    formats = {
        field: getattr(frame, field)
        if getattr(frame, field) is None or step not in params
        else dataclasses.replace(getattr(frame, field), scale=jnp.abs(params[step]))
        for field, step in STEPS.items()
    }
    codes = params["kernel"]
    if frame.weights is not None:
        format = formats["weights"]
        codes = frame.training.encode(params, format)
        scale = frame.training.scale(params, format)
        formats["weights"] = dataclasses.replace(format, scale=scale)
    if isinstance(frame.inputs, Signs):
        formats["inputs"] = Signs(params["shift"])
    if frame.source is not None:
        source = finished[frame.source]
        formats["inputs"] = source.activated or source.outputs
    layer = QuantizedLayer(codes, params["bias"], **formats)
    return with_bias(operation, layer, params["bias"])


def _fit(
    site: Site,
    params: Mapping[str, Params],
    layers: Mapping[str, QuantizedLayer],
    taps: Mapping[str, Tap],
    quantized_taps: Mapping[str, Tap],
) -> Fit:
    """What the report reads."""
    name = site.layer.name
    layer, kernel = layers[name], params[name]["kernel"]
    weight_sqnr = jnp.inf
    if layer.weights is not None:
        values = elementwise(layer.weights, kernel.shape[1]).decode(layer.kernel)
        weight_sqnr = sqnr_db(kernel, values)
    tap, quantized_tap = taps[name], quantized_taps[name]
    pair = (values[None] for values in (tap.activated, quantized_tap.activated))
    return Fit(layer, weight_sqnr, energies(*pair), None, None, None)
