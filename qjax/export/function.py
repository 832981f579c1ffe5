"""`to_onnx`: a network as an ONNX model, for the runtimes that read one."""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qjax.artifact import record_to_json, versions
from qjax.export.blocks import is_block_product
from qjax.formats.spec import in_table
from qjax.graph.layers import Network, Site
from qjax.graph.operation import Convolution
from qjax.graph.tables import names_of_others
from qjax.quantize import Quantized
from qjax.run.layer import QuantizedLayer
from qjax.run.packed import unpack
from qjax.run.tap import float_layers
from qjax.targets import TARGETS, Target

if TYPE_CHECKING:
    import onnx


ONNX_TARGETS = {name: target for name, target in TARGETS.items() if target.reads_onnx}


def to_onnx(
    network: Quantized | Callable[[Any, Any], Any],
    *arguments: Any,
    target: str | Target = "onnxruntime",
    metadata: Mapping[str, Any] | None = None,
) -> "onnx.ModelProto":
    """Writes a network as an ONNX model that takes any number of examples.

    `to_onnx(q, x)` writes a quantized network, `to_onnx(apply_fn, params, x)` a float one. Layers
    become Conv and Gemm between DequantizeLinear and QuantizeLinear (see `qjax.export.layers`), the
    form that runtimes turn into operations on int8.

    Args:
      network: the result of `qjax.quantize`, or a pure inference function of (params, x).
      *arguments: x, an input with a leading axis of examples, or its shape; before it the params,
        for a float network.
      target: what is to run the model: a name in `qjax.targets.TARGETS`, or a `Target`.
      metadata: JSON values by name to keep in the model, such as its accuracy. It holds the target,
        the recipe, the versions and a record of every layer in any case.

    Returns:
      The model, of opset 21; `onnx.save(model, path)` writes it to a file.

    Raises:
      ValueError: no layer; a layer that the target cannot run on integers; an operation without a
        rule; a function that does not do the same for every number of examples.
      ImportError: onnx is not installed.

    Warns:
      UserWarning: layers whose codes are only stored: the target computes with them in float.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> params = {"dense": jnp.array([[0.5, -1.0], [1.0, 0.25]])}
      >>> x = jnp.array([[1.0, 2.0], [3.0, -4.0]])
      >>> recipe = qjax.recipe(8, target="onnxruntime").naive()
      >>> q = qjax.quantize(lambda params, x: x @ params["dense"], params, x, recipe)
      >>> model = qjax.to_onnx(q, x)
      >>> [node.op_type for node in model.graph.node if "Linear" not in node.op_type]
      ['Gemm', 'Identity']
      >>> model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
      'batch'
    """
    check_installed()
    from qjax.export.model import trace_twice, write_model

    chosen = in_table("target", target, ONNX_TARGETS)
    known: dict[str, Any] = {"versions": versions()}
    if isinstance(network, Quantized):
        [x] = counted("to_onnx", arguments, "q, x")
        traced = trace_twice(network.apply_fn.apply_fn, network.apply_fn.params, x)
        params = unpack(network.params)
        check_network(network, traced[0], params["layers"], chosen)
        records = [record_to_json(record) for record in network.report]
        known |= {"target": chosen.name, "recipe": network.report.recipe.to_json()}
        known["layers"] = records
    else:
        leaves, x = counted("to_onnx", arguments, "apply_fn, params, x")
        traced = trace_twice(network, leaves, x)
        params = float_layers(traced[0], leaves)
        known["layers"] = [site.layer.name for site in traced[0].first_sites]
    if not traced[0].sites:
        raise ValueError(
            "`network` has no layer: no convolution or dot product of something in its params with "
            "something that depends on the input."
        )
    return write_model(traced, params, x, chosen, {**known, **(metadata or {})})


def check_installed() -> None:
    """Refuses to write ONNX without the package that does.

    Raises:
      ImportError: onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'writing ONNX needs the package onnx; install it with `pip install "qjax[export]"`.'
        ) from error


def counted(function: str, arguments: tuple[Any, ...], wanted: str) -> tuple[Any, ...]:
    """Refuses another number of arguments than what is wanted after the first one.

    Raises:
      TypeError: there are more or fewer.
    """
    if len(arguments) != wanted.count(","):
        raise TypeError(f"`{function}` takes ({wanted}) here; got {len(arguments) + 1} arguments.")
    return arguments


_SPECS = ("weights", "inputs", "outputs")  # a matmul has no weights


def check_network(
    q: Quantized, network: Network, layers: Mapping[str, QuantizedLayer], target: Target
) -> None:
    """Refuses what the target cannot run, and says which layers it runs in float."""
    others = names_of_others(network, q.report.recipe)
    fields = dict.fromkeys(layers, _SPECS) | dict.fromkeys(q.params.get("matmuls", {}), _SPECS[1:])
    for name, recipe in q.report.recipe.by_layer(list(layers), others).items():
        for argument in fields.get(name, ()):
            try:
                target.check(argument, getattr(recipe, argument))
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
    sites = network.first_sites
    notes = {site.layer.name: _in_float(site, layers[site.layer.name], target) for site in sites}
    found = [f"{name} ({why})" for name, why in notes.items() if why is not None]
    if found:
        warnings.warn(
            f"{target.label} computes in float in the layers {', '.join(found)}; the model holds "
            "their codes, and what they compute is the same.",
            stacklevel=3,
        )


def _in_float(site: Site, layer: QuantizedLayer, target: Target) -> str | None:
    """Why a layer whose weights are codes does not run on integers; None if it does."""
    if layer.weights is None:
        return None
    if is_block_product(site.layer.operation, layer, target):
        return None
    if layer.grid is None:
        return "its input is in float"
    if layer.weights.bits < target.min_bits:
        return f"weights of {layer.weights.bits} bits"
    if layer.is_per_group:
        return "weights with a scale per group"
    is_convolution = isinstance(site.layer.operation, Convolution)
    if layer.outputs is None and (is_convolution or site.layer.operation.matrix_shape[0] > 1):
        return "its output is in float"
    return None
