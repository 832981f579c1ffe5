"""A network as an ONNX model: the evaluator's steps, written by rules."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import onnx
from jax.extend import core
from onnx import helper

from qjax.export.layers import (
    write_activated,
    write_junction,
    write_layer,
    write_matmul,
    write_table,
)
from qjax.export.primitives import write_equation
from qjax.export.sizes import TRACED, Sizes, sizes_by_variable, with_batch
from qjax.export.writer import Tensor, Writer, element_type
from qjax.graph import jaxpr
from qjax.graph.jaxpr import Atom
from qjax.graph.layers import Network, find_layers, shapes_of
from qjax.graph.naming import path_names
from qjax.graph.schedule import Step
from qjax.run.function import bind, steps_of
from qjax.run.interpreter import Rules, evaluate
from qjax.targets import Target


def trace_twice(apply_fn: Any, params: Any, x: Any) -> tuple[Network, Network]:
    """Traces a network at two numbers of examples.

    Args:
      apply_fn: a pure function of (params, x).
      params: a pytree of arrays or shapes.
      x: an input, or its shape, with a leading axis of examples.
    """
    shapes = shapes_of(params)
    few, more = (find_layers(apply_fn, shapes, with_batch(x, size)) for size in TRACED)
    return few, more


def write_model(
    traced: tuple[Network, Network],
    params: Mapping[str, Any],
    x: Any,
    target: Target,
    metadata: Mapping[str, Any],
) -> onnx.ModelProto:
    """Writes a network.

    Args:
      traced: from `trace_twice`.
      params: in the form of `Quantized.params`.
      x: an input, or its shape.
      target: what is to run it.
      metadata: JSON values by name.

    Returns:
      A model that `onnx.checker` accepts.
    """
    network, larger = traced
    flat, leaves = network.flat, jax.tree.leaves(x)
    sizes = sizes_by_variable(flat, larger.flat)
    names = _names(x, "input")
    writer = Writer(sizes, names[0], target)
    values = [
        Tensor(writer.graph.name(name), tuple(range(len(leaf.shape))))
        for name, leaf in zip(names, leaves, strict=True)
    ]
    env = bind(network, params, jax.tree.unflatten(jax.tree.structure(x), values))
    by_path = dict(zip(network.paths, flat.params, strict=True))
    for path, table in params.get("tables", {}).items():
        env[by_path[path]] = write_table(writer, table, by_path[path])
    steps, read = steps_of(network, params)
    evaluate(steps, env, read, _rules(writer, steps))
    writer.graph.scope = ""
    tree = jax.tree.unflatten(flat.out_tree, flat.outputs)
    outputs = []
    for name, atom in zip(_names(tree, "output"), flat.outputs, strict=True):
        value = writer.plain(jaxpr.read(env, atom), atom)
        outputs.append(_described(writer.graph.named(value, name), atom, writer.sizes(atom)))
    pairs = zip(values, flat.inputs, strict=True)
    inputs = [_described(value.name, var, sizes[var]) for value, var in pairs]
    texts = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    model = writer.graph.model(inputs, outputs, texts)
    onnx.checker.check_model(model, full_check=True)
    return model


def _rules(writer: Writer, steps: tuple[Step, ...]) -> Rules:
    """The rules that write a network: every primitive among its steps has one, or is refused."""

    def real(value: Any, atom: Atom) -> Any:
        raise AssertionError("no equation is left to be bound")

    equations = (step for step in steps if isinstance(step, core.JaxprEqn))
    primitives = {step.primitive.name for step in equations}
    write = dict.fromkeys(primitives, partial(write_equation, writer))
    written = write_layer, write_activated, write_junction, write_matmul
    layer, activated, joined, multiplied = (partial(rule, writer) for rule in written)
    return Rules(layer, activated, write, real, joined, multiplied)


def _names(tree: Any, alone: str) -> list[str]:
    """The names of a pytree's leaves; a leaf that is the whole tree has the one given."""
    return [path or alone for path in path_names(tree)]


def _described(name: str, atom: Atom, sizes: Sizes) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else str(size) for size in sizes]
    return helper.make_tensor_value_info(name, element_type(jaxpr.dtype(atom)), shape)
