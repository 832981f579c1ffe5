"""Where branches of a network meet: sums, concatenations, and what goes into them.

No layer computes these values, so that the formats of layers leave them in float. With
`Recipe.sums` they have grids of their own:

* residual sums of two values that depend on the input, and concatenations;
* what goes into one of them or into an average pool, where it is no layer's output or such a value
  moved, clipped or selected from: a pool, the network's input, a product of two activations.

A value that is added to what was computed from it without a layer between, as in x + c·x³, is part
of a function of one value and no junction. A pool that layers alone read has their inputs' grid.
"""

import collections
import math
from typing import NamedTuple

from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.activation import Activation, find_activation, keeps_codes
from qjax.graph.chain import Graph
from qjax.graph.jaxpr import Atom
from qjax.graph.layers import Network

_SUMS = ("add", "add_any")
_POOLS = ("reduce_sum", "reduce_window_sum")


class Junction(NamedTuple):
    """A value that gets a grid of its own.

    Attributes:
      name: the last layer before it and its kind, e.g. `layer1/block0/conv2/sum`.
      layer: the name of that layer; empty if there is none.
      kind: sum, concat, pool or branch (what goes into one of them).
      var: the value.
      activation: what follows it.
    """

    name: str
    layer: str
    kind: str
    var: core.Var
    activation: Activation


def find_junctions(network: Network) -> tuple[Junction, ...]:
    """Finds where the branches of a network meet, in dataflow order.

    Args:
      network: a traced network.

    Examples:
      >>> import jax.numpy as jnp
      >>> from qjax.graph.layers import find_layers
      >>> params = {"first": jnp.ones((4, 4)), "second": jnp.ones((4, 4))}
      >>> def apply_fn(params, x):
      ...     x = x @ params["first"]
      ...     return x + x @ params["second"]
      >>> network = find_layers(apply_fn, params, jnp.ones((2, 4)))
      >>> [junction.name for junction in find_junctions(network)]
      ['second/sum']
    """
    graph = Branches(network)
    joined = {var: kind for var, kind, _ in graph.joins}
    kinds = joined | dict.fromkeys(graph.pools, "pool")
    wanted = set(joined)
    operands = [graph.source[v] for _, _, given in graph.joins for v in given]
    read_by_layers = {graph.source[site.input] for site in network.sites}
    for var, operand in reversed(graph.pools.items()):
        if var in operands or var in read_by_layers:
            operands.append(graph.source[operand])
    wanted.update(operands)
    found, counts = [], collections.Counter[str]()
    for var in (*network.flat.inputs, *graph.order):
        if var not in wanted or var in graph.outputs:
            continue
        kind, latest = kinds.get(var, "branch"), graph.latest[var]
        layer = network.sites[latest].layer.name if latest >= 0 else ""
        name = f"{layer or 'input'}/{kind}"
        counts[name] += 1
        if counts[name] > 1:
            name = f"{name}@{counts[name] - 1}"
        activation = find_activation(graph.graph, var).activation.shown
        found.append(Junction(name, layer, kind, var, activation))
    return tuple(found)


class Branches:
    """What is known of the values between the layers of a network.

    Attributes:
      graph: who reads and writes what.
      outputs: the pre-activation outputs of layers.
      order: the other values that depend on the input, as they are computed.
      latest: the position of the last layer before a value, -1 for none.
      source: the value that this one is moved, clipped or selected from; itself if from none.
      joins: sums and concatenations: (value, kind, operands).
      pools: the operand of every sum over elements, scale applied, by its result.
    """

    def __init__(self, network: Network) -> None:
        """Goes through the equations of a network once."""
        flat = network.flat
        self.graph: Graph = Graph(flat)
        self._depends, live = jaxpr.dependences(flat), jaxpr.needed(flat)
        self.outputs: dict[core.Var, int] = {
            site.output: index for index, site in enumerate(network.sites)
        }
        self.order: list[core.Var] = []
        starts = (*flat.inputs, *flat.carried)
        self.latest: dict[core.Var, int] = dict.fromkeys(starts, -1)
        self.source: dict[core.Var, core.Var] = {var: var for var in starts}
        self.joins: list[tuple[core.Var, str, list[core.Var]]] = []
        self.pools: dict[core.Var, core.Var] = {}
        inside = {position for site in network.sites for position in site.chain}
        before: dict[core.Var, int] = {}  # of what a layer is still computing
        for position, equation in enumerate(flat.equations):
            given = self._given(equation)
            if position not in live or not given:
                continue
            latest = max(before.get(var, self.latest.get(var, -1)) for var in given)
            for var in equation.outvars:
                if var in self.outputs:
                    self.latest[var], self.source[var] = self.outputs[var], var
                elif position in inside:
                    before[var] = latest
                else:
                    self.order.append(var)
                    self.latest[var] = latest
                    is_moved = _moves(equation, given)
                    self.source[var] = self.source[given[0]] if is_moved else var
            if position not in inside:
                self._record(equation, given)

    def _given(self, equation: core.JaxprEqn) -> list[core.Var]:
        operands = jaxpr.variables(equation.invars)
        return [var for var in operands if jaxpr.depends_on([var], self._depends).x]

    def _record(self, equation: core.JaxprEqn, given: list[core.Var]) -> None:
        name, var = equation.primitive.name, equation.outvars[0]
        if name in _SUMS and len(given) == 2:
            one, other = given
            if not (one in self._leading_to(other) or other in self._leading_to(one)):
                self.joins.append((var, "sum", given))
        elif name == "concatenate":
            self.joins.append((var, "concat", given))
        elif name in _POOLS:
            self.pools[self._scaled(var)] = given[0]

    def _leading_to(self, var: core.Var) -> set[core.Var]:
        """What a value is computed from without a layer between, itself among them."""
        found, todo = set(), [var]
        while todo:
            var = todo.pop()
            if var in found:
                continue
            found.add(var)
            if var not in self.outputs and var in self.graph.writer:
                todo += self._given(self.graph.writer[var])
        return found

    def _scaled(self, var: core.Var) -> core.Var:
        """A sum over elements after the division by their number."""
        reader = self.graph.only_reader(var)
        equation = None if reader is None else self.graph.equations[reader]
        if equation is None or equation.primitive.name not in ("mul", "div"):
            return var
        is_scaled = self._given(equation) == [var] and equation.invars[0] is var  # not c / x
        return self._scaled(equation.outvars[0]) if is_scaled else var


def _moves(equation: core.JaxprEqn, given: list[core.Var]) -> bool:
    """Whether the result of an equation lies on the grid of what it is given."""
    if equation.primitive.name == "pad":
        return _is_zero(equation.invars[1])
    return len(given) == 1 and keeps_codes(equation, given[0], lambda: -math.inf)


def _is_zero(atom: Atom) -> bool:
    return jaxpr.is_literal(atom) and float(atom.val) == 0
