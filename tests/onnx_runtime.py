"""ONNX Runtime, and networks quantized without calibration: fast to make, all layers on codes."""

import collections
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime

import qjax
from qjax.formats.affine import QParams
from qjax.graph.activation import follow_codes
from qjax.graph.layers import Site, find_layers, shapes_of
from qjax.graph.schedule import Activated, schedule
from qjax.recipe import LayerRecipe
from qjax.report import Report
from qjax.run.function import QuantizedFunction
from qjax.run.layer import QuantizedLayer
from qjax.run.tap import float_layers


class Run(NamedTuple):
    """What a model returned, and the operators that it was optimized to."""

    outputs: list[np.ndarray]
    operators: collections.Counter[str]


def run(model: onnx.ModelProto, x: Any, folder: Path | None = None) -> Run:
    """Runs a model as it stands, or optimized, the graph then written to a folder."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Without VNNI instructions the default kernels saturate sums of two products at 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    levels = onnxruntime.GraphOptimizationLevel
    optimizes = folder is not None
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimizes else levels.ORT_DISABLE_ALL
    )
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    feeds = {n: np.asarray(leaf) for n, leaf in zip(names, jax.tree.leaves(x), strict=True)}
    outputs: Any = session.run(None, feeds)
    graph = model if folder is None else onnx.load(folder / "optimized.onnx")
    return Run(outputs, collections.Counter(node.op_type for node in graph.graph.node))


def quantized(
    apply_fn: Any, params: Any, x: Any, recipe: qjax.Recipe | None = None
) -> qjax.Quantized:
    """Quantizes with made-up ranges whose scales are powers of two.

    Sums of products are then exact in float32, however they are computed, so that every runtime
    rounds them alike. Inputs lie in [-3, 5), outputs too, or in [0, 8) where a ReLU follows.
    """
    recipe = qjax.recipe(8) if recipe is None else recipe
    network = find_layers(apply_fn, params, shapes_of(x))
    floats = float_layers(network, params)
    own = recipe.by_layer([site.layer.name for site in network.sites])
    layers: dict[str, QuantizedLayer] = {}
    grids: dict[Any, QParams] = {}
    for step in schedule(network):
        if isinstance(step, Site):
            name, known = step.layer.name, grids.get(step.input)
            layers[name] = _layer(step, floats["layers"][name], own[name], known)
            if layers[name].outputs is not None:
                grids[step.output] = layers[name].outputs
        elif not isinstance(step, Activated):
            follow_codes(step, grids, lambda grid: float(grid.range[1]))
    shapes = {site.layer.name: site.layer.kernel_shape for site in network.sites}
    function = QuantizedFunction(apply_fn, shapes_of(params), shapes)
    quantized = {"layers": layers, "rest": floats["rest"]}
    return qjax.Quantized(function, quantized, Report([], recipe, network.skipped))


def _layer(
    site: Site, layer: QuantizedLayer, recipe: LayerRecipe, known: QParams | None
) -> QuantizedLayer:
    zero = 0 if site.activation.bounds[0] == 0.0 else 3 / 8
    inputs, outputs = _activation(recipe.inputs, 3 / 8), _activation(recipe.outputs, zero)
    inputs = None if inputs is None else known or inputs
    if recipe.weights is None:
        return dataclasses.replace(layer, inputs=inputs, outputs=outputs)
    spec, kernel = recipe.weights, np.asarray(layer.kernel)
    groups, patch, channels = kernel.shape
    size = spec.group_size if spec.granularity == "per_group" else patch
    blocks = kernel.reshape(groups, -1, size, channels)
    scale = np.float32(2.0 ** np.ceil(np.log2(np.abs(blocks).max(2) / spec.qmax)))
    codes = np.round(blocks / scale[:, :, None]).reshape(kernel.shape).astype(spec.dtype)
    weights = QParams(scale, np.zeros(scale.shape, np.int32), spec.qmin, spec.qmax)
    made = QuantizedLayer(codes, layer.bias, weights, inputs, outputs, None)
    if made.has_integer_accumulator:
        unit = np.broadcast_to(scale, (groups, 1, channels)).reshape(-1) * inputs.scale
        made = dataclasses.replace(made, bias=np.int32(np.round(np.asarray(layer.bias) / unit)))
    return jax.tree.map(jnp.asarray, made)


def _activation(spec: qjax.QuantSpec | None, zero: float) -> QParams | None:
    """Codes of steps of 8 / 2^bits; real 0 is that share of the way up."""
    if spec is None:
        return None
    zero_point = 0 if spec.symmetric else round(zero * 2**spec.bits)
    scale = np.float32(8 / 2**spec.bits)
    return QParams(scale, np.int32(zero_point), spec.qmin, spec.qmax)
