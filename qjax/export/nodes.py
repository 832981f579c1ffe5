"""A graph of ONNX nodes that is being written."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 21
IR_VERSION = 10  # of the first release with that opset


class Graph:
    """Nodes in order of evaluation, and constants; what is asked for twice is made once.

    Attributes:
      nodes: `onnx.NodeProto`.
      constants: arrays by name.
      scope: what the names of new nodes start with.

    Examples:
      >>> graph = Graph()
      >>> one = graph.constant(np.float32(1))
      >>> graph.node("Add", "x", one), graph.node("Add", "x", one), graph.node("Neg", "x")
      ('Add', 'Add', 'Neg')
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.scope = ""
        self._made: dict[Any, list[str]] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def constant(self, array: Any, name: str = "constant") -> str:
        """The name of a constant, of which there is one.

        Args:
          array: its values, of NumPy's types or those of `ml_dtypes`.
          name: what it is called in its scope, if it is new.
        """
        array = np.asarray(array)
        key = "constant", str(array.dtype), array.shape, array.tobytes()
        if key not in self._made:
            self._made[key] = [self.own_constant(array, name)]
        return self._made[key][0]

    def own_constant(self, array: np.ndarray, name: str) -> str:
        """The name of a new constant. Runtimes that rewrite kernels rely on their being read once.

        Args:
          array: its values.
          name: what it is called in its scope.
        """
        unique = self.name(name)
        self.constants[unique] = array
        return unique

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """The name of the one output of a node.

        Args:
          operator: of ONNX.
          *inputs: names; the empty name leaves an optional input out.
          **attributes: of the operator.
        """
        return self.outputs(1, operator, *inputs, **attributes)[0]

    def outputs(self, count: int, operator: str, *inputs: str, **attributes: Any) -> list[str]:
        """The names of the outputs of a node that has several."""
        key = operator, inputs, count, repr(sorted(attributes.items()))
        if key not in self._made:
            names = [self.name(operator) for _ in range(count)]
            node = helper.make_node(operator, inputs, names, names[0], **attributes)
            self.nodes.append(node)
            self._made[key] = names
        return self._made[key]

    def named(self, tensor: str, name: str) -> str:
        """A tensor under a name of its own, which the scope makes unlike all others."""
        unique = self.name(name)
        self.nodes.append(helper.make_node("Identity", [tensor], [unique], unique))
        return unique

    def name(self, name: str) -> str:
        """A name in the scope that nothing else has."""
        name = f"{self.scope}/{name}" if self.scope else name
        self._counts[name] += 1
        count = self._counts[name]
        return name if count == 1 else f"{name}_{count}"

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """The model of all that its outputs need.

        Args:
          inputs: of the model.
          outputs: of the model; their names are those of nodes' outputs.
          metadata: of the model.
        """
        wanted, nodes = {value.name for value in outputs}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                nodes.append(node)
                wanted.update(node.input)
        constants = [
            numpy_helper.from_array(array, name)
            for name, array in self.constants.items()
            if name in wanted
        ]
        graph = helper.make_graph(nodes[::-1], "qjax", inputs, outputs, constants)
        domains = {node.domain for node in nodes} - {""}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qjax"
        )
        helper.set_model_props(model, metadata)
        return model
