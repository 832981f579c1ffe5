"""`to_tflite`: a network as a .tflite model, fully on int8, for LiteRT.

The network is evaluated in float with a composite operation `quant.fake_quant` wherever a value is
rounded; LiteRT's converter turns what stands between two of them into operators on int8, biases
into int32. Activations are clipped before they are rounded, which is the same as 0 is on every
grid: the converter then makes the ReLU a part of the layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.extend import core

from qjax.export.function import check_network, counted
from qjax.formats.affine import QParams
from qjax.graph import jaxpr
from qjax.graph.activation import NONE, Activation, clip_bounds
from qjax.graph.junctions import Junction
from qjax.graph.layers import Network, Site, shapes_of
from qjax.graph.matmuls import Matmul
from qjax.graph.operation import Convolution, along_channels
from qjax.integer.codes import GridKey, grid_key
from qjax.quantize import Quantized
from qjax.run.function import bind, outputs_of, steps_of
from qjax.run.interpreter import Rules, evaluate
from qjax.run.layer import QuantizedLayer, dequantized_bias, scaled_kernel
from qjax.run.matmul import QuantizedMatmul
from qjax.targets import LITERT

_OFFSET = 128  # from the codes of activations, 0 to 255, to int8


class OnGrid(NamedTuple):
    """A real value that was rounded.

    Attributes:
      array: the value.
      grid: of its codes.
      least: what no element is below.
    """

    array: jax.Array
    grid: GridKey
    least: float


def to_tflite(network: Quantized | Callable[[Any, Any], Any], *arguments: Any) -> bytes:
    """Writes a network as a .tflite model.

    `to_tflite(q, x)` writes a quantized network, `to_tflite(apply_fn, params, x)` a float one.

    Args:
      network: the result of `qjax.quantize`, inputs and outputs of layers of 8 bits, asymmetric,
        one scale to a tensor; or a pure inference function of (params, x).
      *arguments: x, an input, or its shape; the model takes as many examples. Before it the params,
        for a float network.

    Returns:
      The model; its signature `serving_default` has the inputs `input_0`, … and outputs `output_0`,
      …, in float.

    Raises:
      ValueError: a format that LiteRT does not run on integers, or an operation that it has not.
      ImportError: litert-converter is not installed.
    """
    api, mlir, passes = _converter()
    if isinstance(network, Quantized):
        [x] = counted("to_tflite", arguments, "q, x")
        function = _quantized(network, x)
    else:
        params, x = counted("to_tflite", arguments, "apply_fn, params, x")
        function = partial(network, params)
    exported = export.export(jax.jit(function))(shapes_of(x))
    inputs, outputs = (
        [f"{kind}_{i}" for i in range(len(avals))]
        for kind, avals in (("input", exported.in_avals), ("output", exported.out_avals))
    )
    context = mlir.Context()
    api.prepare_mlir_context(context)
    with context:
        module = mlir.Module.parse(exported.mlir_module())
        config = api.ConvertToTFLConfig()
        config.qdq_conversion_mode, config.strict_qdq_mode = "STATIC", True
        api.set_signature(module.operation, "serving_default", inputs, outputs)
        api.run_convert_to_tfl_passes(module, passes.PassManager(), config)
        left = str(module).count("stablehlo.")
        if left:
            raise ValueError(
                f"`network` cannot be a .tflite model: the converter left {left} operations that "
                "LiteRT does not have. Replace what stands between its layers, or use qjax.to_onnx."
            )
        return api.export_flatbuffer_to_bytes(module.operation)


def _converter() -> tuple[Any, Any, Any]:
    """The converter's programming interface, MLIR and its passes, whose members are native."""
    try:
        from litert_converter import converter_api_ext as api  # pyright: ignore
        from litert_converter.mlir import ir, passmanager  # pyright: ignore
    except ImportError as error:
        raise ImportError(
            "writing .tflite needs the package litert-converter; install it with "
            '`pip install "qjax[runtimes]"`.'
        ) from error
    return api, ir, passmanager


def _quantized(q: Quantized, x: Any) -> Callable[[Any], Any]:
    """The function that the converter reads as quantized.

    Raises:
      ValueError: a format that LiteRT does not run on integers.
    """
    network, layers = q.apply_fn.network(x), q.params["layers"]
    check_network(q, network, layers, LITERT)
    for name, layer in layers.items():
        _check(name, layer)
    for name, matmul in q.params.get("matmuls", {}).items():
        _check_grids(f"matmul {name!r}", matmul.formats)
    return lambda x: _evaluated(network, q.params, x)


def _check(name: str, layer: QuantizedLayer) -> None:
    if layer.is_per_group:
        raise ValueError(
            f"layer {name!r}: `weights` must have granularity per_channel or per_tensor for "
            "LiteRT; got per_group."
        )
    _check_grids(f"layer {name!r}", {"inputs": layer.inputs, "outputs": layer.outputs})


def _check_grids(where: str, grids: Mapping[str, Any]) -> None:
    for field, grid in grids.items():
        if grid is not None and (int(grid.qmin), int(grid.qmax)) != (0, 255):
            raise ValueError(
                f"{where}: `{field}` must have 8 bits, asymmetric, for LiteRT, which clips "
                f"to those; got codes from {int(grid.qmin)} to {int(grid.qmax)}."
            )


def _evaluated(network: Network, params: Any, x: Any) -> Any:
    env = bind(network, params, x)
    steps, read = steps_of(network, params)
    equations = [step for step in steps if isinstance(step, core.JaxprEqn)]
    primitives = dict.fromkeys((e.primitive.name for e in equations), _keep_if_clipped)
    rules = Rules(_layer, _activated, primitives, _real, _joined, _multiplied)
    evaluate(steps, env, read, rules)
    return outputs_of(network, env, rules)


def _real(value: Any, atom: jaxpr.Atom) -> Any:
    return value.array if isinstance(value, OnGrid) else value


def _keep_if_clipped(equation: core.JaxprEqn, values: list[Any]) -> list[Any] | None:
    """Leaves out a clip of what lies within its bounds already."""
    variables = jaxpr.variables(equation.invars)
    found = [value for value in values if isinstance(value, OnGrid)]
    if len(variables) != 1 or len(found) != 1 or len(equation.outvars) != 1:
        return None
    bounds = clip_bounds(equation, {variables[0]: (-np.inf, np.inf)})
    if bounds is None or jaxpr.shape(equation.outvars[0]) != jaxpr.shape(variables[0]):
        return None
    is_within = bounds[0] <= found[0].least and found[0].grid.greatest <= bounds[1]
    return found if is_within else None


def _rounded(x: Any, grid: QParams, activation: Activation = NONE) -> OnGrid:
    """Rounds a value to a grid, unless it lies on it already.

    Args:
      x: the value.
      grid: its grid.
      activation: what follows it.
    """
    key = grid_key(grid)
    assert key is not None
    if isinstance(x, OnGrid):
        if x.grid == key:
            return x
        x = x.array
    low, high = activation.bounds
    if low == 0:
        x = jax.nn.relu6(x) if high == 6 else jax.nn.relu(x)
    least = max(low, key.scales[0] * (key.qmin - key.zero_points[0]))
    return OnGrid(_fake_quant(x, grid, _OFFSET), key, least)


def _layer(site: Site, layer: QuantizedLayer, value: Any) -> Any:
    operation, weights = site.layer.operation, layer.weights
    x = value if layer.inputs is None else _rounded(value, layer.inputs)
    kernel = operation.from_matrix(scaled_kernel(layer))
    if weights is not None:
        is_convolution = isinstance(operation, Convolution)
        axis = operation.dimension_numbers.rhs_spec[0] if is_convolution else kernel.ndim - 1
        kernel = _fake_quant(kernel, weights, 0, axis if weights.scale.size > 1 else None)
    y = operation.apply(_real(x, site.input), kernel)
    y = y + along_channels(operation, dequantized_bias(operation, layer), y.ndim)
    y = site.movement(y)
    return y if layer.outputs is None else _rounded(y, layer.outputs, site.activation)


def _activated(site: Site, layer: QuantizedLayer, value: Any) -> Any:
    return value if layer.activated is None else _rounded(value, layer.activated)


def _joined(junction: Junction, grid: QParams, value: Any) -> OnGrid:
    return _rounded(value, grid, junction.activation)


def _multiplied(step: Matmul, matmul: QuantizedMatmul, lhs: Any, rhs: Any) -> Any:
    x, y = _rounded(lhs, matmul.lhs), _rounded(rhs, matmul.rhs)
    z = step.product.apply(x.array, y.array)
    return z if matmul.outputs is None else _rounded(z, matmul.outputs)


def _fake_quant(x: jax.Array, grid: QParams, offset: int, axis: int | None = None) -> jax.Array:
    """The composite operation that the converter reads."""
    scale = np.asarray(grid.scale, np.float64).reshape(-1)
    zero_point = np.asarray(grid.zero_point, np.int64).reshape(-1) - offset
    along = {} if axis is None else {"quantization_dimension": np.int32(axis)}
    attributes = {"scale": scale, "zero_point": zero_point, "dtype": "i8"} | along
    rounded: Callable[..., Any] = lax.composite(lambda x, **_: x, name="quant.fake_quant")
    return rounded(jnp.asarray(x), **attributes, narrow_range=offset == 0)
