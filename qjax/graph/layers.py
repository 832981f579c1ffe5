"""Finding the layers of a network in its jaxpr.

A layer is a convolution or a dot product of something that depends on params only (its kernel) and
something that depends on the input, together with the chain of per-channel affine operations after
it (bias, batch norm), up to its pre-activation output.
"""

import collections
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from qjax.formats.affine import cast
from qjax.graph import jaxpr
from qjax.graph.activation import NONE, Activation, find_activation, with_clips
from qjax.graph.chain import Chain, ChannelOperation, Graph, affine_chain
from qjax.graph.flatten import flatten
from qjax.graph.frameworks import advising, check_network
from qjax.graph.jaxpr import Atom, Equations, FlatJaxpr, dtype, shape
from qjax.graph.naming import layer_names, path_names
from qjax.graph.operation import Linear, linear_operation
from qjax.programs import FAST_TO_RUN, compiled

REMEMBERED = 16  # networks, with the programs that were compiled for them
REMEMBERED_PROGRAMS = 16  # of a network

_REMEDY = {
    "while": (
        "give the loop a number of steps that is known before (`jax.lax.scan`, or "
        "`jax.lax.fori_loop` between Python numbers)"
    ),
    "cond": "choose the branch in Python, outside of the traced function",
    "custom_vjp_call": "call the function without its custom_vjp rule for inference",
}


_TWO_ACTIVATIONS = "a product of two activations"
_CHOOSING = {
    "gather": "rows of a table, chosen by the input",
    "dynamic_slice": "a part of a table, chosen by the input",
    "ragged_dot_general": "a kernel for every group of examples",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, described statically.

    Attributes:
      name: where its kernel lives in params, e.g. `layer1/block0/conv1`.
      kind: conv, depthwise_conv, grouped_conv, dense or grouped_dense.
      activation: what follows its output: a name in `ACTIVATIONS`, or other.
      kernel_shape: shape of the kernel as the operation sees it.
      input_shape: shape of its input, batch included.
      output_shape: shape of its output, batch included.
      macs: multiply-accumulate operations per example.
      operation: the linear operation with its static parameters.
    """

    name: str
    kind: str
    activation: str
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    operation: Linear


class Shortcut(NamedTuple):
    """What the output of a layer is added to, if that is all that reads the output.

    Attributes:
      value: the other operand of the sum.
      activation: what follows the sum.
    """

    value: core.Var
    activation: Activation


class Site(NamedTuple):
    """Where a layer stands in the flat jaxpr; in an unrolled loop, a site for every step.

    Attributes:
      layer: its description.
      input: the variable it reads.
      kernel: the atom of its kernel.
      chain: the positions of its equations, contraction first.
      operations: the affine operations among them.
      movement: the equations among them that only move elements, as a function of one array.
      output: the pre-activation output.
      activation: what follows the output.
      activated: the value after the activation (`output` where there is none).
      activating: the equations between the two.
      shortcut: what its output is added to, None if it goes anywhere else.
    """

    layer: Layer
    input: core.Var
    kernel: Atom
    chain: tuple[int, ...]
    operations: tuple[ChannelOperation, ...]
    movement: "Movement"
    output: core.Var
    activation: Activation
    activated: core.Var
    activating: tuple[core.JaxprEqn, ...]
    shortcut: Shortcut | None

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The axes of the pre-activation output that hold the output channels."""
        if self.operations:
            return self.operations[-1].channel_axes
        rank = len(shape(self.output))
        return tuple(axis % rank for axis in self.layer.operation.channel_axes)

    def inputs_of_all_steps(self, inputs: Sequence[jax.Array]) -> jax.Array:
        """Its inputs in all steps of a loop as one array; see `outputs_of_all_steps`."""
        return _of_all_steps(inputs, self.layer.operation.position_axis(inputs[0].ndim))

    def outputs_of_all_steps(self, outputs: Sequence[jax.Array]) -> jax.Array:
        """Its outputs in all steps as one array; of a single position, those of the first step."""
        axes = (axis for axis in range(outputs[0].ndim) if axis not in self.channel_axes)
        return _of_all_steps(outputs, next(axes, None))


def _of_all_steps(values: Sequence[jax.Array], axis: int | None) -> jax.Array:
    return values[0] if len(values) == 1 or axis is None else jnp.concatenate(values, axis)


class Movement(NamedTuple):
    """What brings the output of a layer's operation to the shape and type that is read.

    Attributes:
      equations: that only move elements, one after the other.
      dtype: of the result.
    """

    equations: tuple[Equations, ...]
    dtype: Any

    def __call__(self, y: jax.Array) -> jax.Array:
        """Moves an output, in float."""
        for equation in self.equations:
            y = equation.single(y)
        return cast(y, self.dtype)

    def of_codes(self, codes: jax.Array) -> jax.Array:
        """Moves codes: their type stays."""
        for moves in self.equations:
            [equation] = moves.equations
            if equation.primitive.name != "convert_element_type":
                [codes] = jaxpr.bind(equation, [codes])
        return codes

    def __bool__(self) -> bool:
        """Whether there is anything but a change of type."""
        return bool(self.equations)


class Skipped(NamedTuple):
    """A contraction that stays in float, and why."""

    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    reason: str

    @property
    def is_matmul(self) -> bool:
        """Whether it is a product of matrices whose operands both depend on the input."""
        return (self.primitive, self.reason) == ("dot_general", _TWO_ACTIVATIONS)

    @property
    def is_lookup(self) -> bool:
        """Whether it picks among params by the input."""
        return _CHOOSING.get(self.primitive) == self.reason


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A flat jaxpr and its layers in dataflow order.

    Attributes:
      flat: the jaxpr.
      sites: where its layers stand.
      skipped: contractions that stay in float.
      products: positions of the equations that multiply two activations, see
        `qjax.graph.matmuls`; they are among the skipped too.
      lookups: positions of the equations that pick among params by the input, see
        `qjax.graph.tables`; they are among the skipped too.
      paths: of the leaves of its params.
      programs: what was compiled for this network, the last used ones, by what they do; freed
        with it.
    """

    flat: FlatJaxpr
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    products: tuple[int, ...]
    lookups: tuple[int, ...]
    paths: tuple[str, ...]
    programs: collections.OrderedDict[Hashable, Callable[..., Any]] = dataclasses.field(
        default_factory=collections.OrderedDict, repr=False
    )

    @functools.cached_property
    def first_sites(self) -> tuple[Site, ...]:
        """The one site of every layer, the first one where the steps of a loop share it."""
        found: dict[str, Site] = {}
        for site in self.sites:
            found.setdefault(site.layer.name, site)
        return tuple(found.values())

    def sites_of(self, name: str) -> tuple[Site, ...]:
        """The sites of a layer."""
        return tuple(site for site in self.sites if site.layer.name == name)

    @property
    def belongs_to_a_trace(self) -> bool:
        """Whether it was made within a trace from outside, and is of no use after that."""
        return any(isinstance(value, Tracer) for value in self.flat.constants.values())

    def program(
        self, key: Hashable, function: Callable[..., Any], options: Mapping[str, Any] = FAST_TO_RUN
    ) -> Callable[..., Any]:
        """The compiled form of a function of this network: jitted once, found by its key later.

        Args:
          key: what it does.
          function: the function.
          options: of the compiler, see `qjax.programs`.
        """
        if key not in self.programs:
            self.programs[key] = compiled(function, options)
            while len(self.programs) > REMEMBERED_PROGRAMS:
                self.programs.popitem(last=False)
        self.programs.move_to_end(key)
        return self.programs[key]


def trace(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> tuple[Layer, ...]:
    """Finds the layers of a network, in dataflow order.

    Args:
      apply_fn: a pure inference function of (params, x).
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      x: an input with a leading batch axis, or its shape as `jax.ShapeDtypeStruct`.

    Returns:
      One `Layer` per convolution or dot product with a kernel.

    Raises:
      ValueError: a layer stands where it cannot be rewritten (inside `while`, `cond`,
        `custom_vjp`, or a loop of too many steps), or its kernel is not in `params`.
      TypeError: `apply_fn` is no function, or `params` holds what is no array.

    Examples:
      >>> params = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
      >>> def apply_fn(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["head"]
      >>> [(layer.name, layer.activation) for layer in trace(apply_fn, params, jnp.ones((8, 3)))]
      [('hidden', 'relu'), ('head', 'none')]
    """
    check_network(apply_fn, params)
    return tuple(site.layer for site in find_layers(apply_fn, params, x).first_sites)


def shapes_of(tree: Any) -> Any:
    """The shapes of a pytree's arrays and the types that JAX gives them: `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree
    )


_remembered: collections.OrderedDict[Any, Network] = collections.OrderedDict()
_remembering = threading.Lock()


def find_layers(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> Network:
    """Traces a network and finds where its layers stand; see `trace`.

    The last networks are remembered by function and shapes, as `jax.jit` remembers its programs.
    """
    shapes = shapes_of((params, x))
    leaves, structure = jax.tree.flatten(shapes)
    widest = jnp.result_type(float)  # of numbers without a type: it depends on jax_enable_x64
    key = (apply_fn, structure, widest, *((leaf.shape, leaf.dtype) for leaf in leaves))
    try:
        hash(key)
    except TypeError:  # a function without a hash cannot be recognised
        return _find_layers(apply_fn, *shapes)
    with _remembering:
        if key in _remembered:
            _remembered.move_to_end(key)
            return _remembered[key]
    network = _find_layers(apply_fn, *shapes)
    if network.belongs_to_a_trace:
        return network
    with _remembering:
        _remembered[key] = network
        while len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return network


def check_layers(network: Network) -> None:
    """Refuses a network that has nothing to quantize.

    Raises:
      ValueError: it has no layer.
    """
    if not network.sites:
        raise ValueError(
            "`apply_fn` has no layer to quantize: no convolution or dot product of something in "
            "`params` with something that depends on the input."
            + "".join(f" In float: {skip.primitive}, {skip.reason}." for skip in network.skipped)
        )


def _find_layers(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> Network:
    with advising(apply_fn):
        flat = with_clips(flatten(apply_fn, params, x))
    paths = path_names(params)
    sizes = [math.prod(shape(var)) for var in flat.params]
    found = jaxpr.dependences(flat)
    graph = Graph(flat)
    live = jaxpr.needed(flat)
    sites, kernels, skipped, products, lookups = [], [], [], [], []
    for position, equation in enumerate(flat.equations):
        is_contraction = jaxpr.contains_contraction(equation)
        if position not in live or not (is_contraction or equation.primitive.name in _CHOOSING):
            continue
        operands = [jaxpr.depends_on([atom], found) for atom in equation.invars]
        if not any(operand.x for operand in operands):
            continue
        if reason := _chosen_by_input(equation, operands):
            skipped.append(_skip(equation, reason))
            lookups.append(position)
        if not is_contraction:
            continue
        by_params = [i for i, operand in enumerate(operands) if operand.params_only]
        leaves = [i for operand in by_params for i in operands[operand].params]
        kernel_leaf = max(leaves, key=sizes.__getitem__, default=None)
        name = "" if kernel_leaf is None else paths[kernel_leaf]
        if equation.primitive.name not in jaxpr.CONTRACTIONS:
            if by_params:
                raise _refusal(equation, name)
            skipped.append(_skip(equation, _TWO_ACTIVATIONS))
        elif by_params:
            kernel_is_lhs = by_params[0] == 0
            operation = linear_operation(equation, kernel_is_lhs)
            if operation is None:
                skipped.append(_skip(equation, "its kernel is the first operand, or batch groups"))
                continue
            sites.append(_site(graph, found, position, operation, kernel_is_lhs, name))
            assert kernel_leaf is not None
            element = _element(graph, equation.invars[by_params[0]], kernel_leaf, found)
            kernels.append((name, element))
        elif any(operand.constant and not operand.x for operand in operands):
            raise ValueError(
                f"the kernel of a {equation.primitive.name} of shape "
                f"{shape(equation.invars[1])} is closed over by `apply_fn` and not in "
                "`params`, so it has no name; pass it in through `params`."
            )
        elif all(operand.x for operand in operands):
            is_gathered = any(_is_gathered(graph, found, atom) for atom in equation.invars)
            reason = "its kernel is chosen by the input" if is_gathered else _TWO_ACTIVATIONS
            skipped.append(_skip(equation, reason))
            products += [position] if skipped[-1].is_matmul else []
        else:
            skipped.append(_skip(equation, "its kernel is computed without params"))
    shared = _shared_by_steps(flat, sites)
    names = layer_names([kernels[positions[0]] for positions in shared], paths)
    for positions, name in zip(shared, names, strict=True):
        alike = _alike(graph, found, [sites[position] for position in positions])
        macs = sum(site.layer.macs for site in alike) // examples_of(flat)
        for position, site in zip(positions, alike, strict=True):
            layer = dataclasses.replace(site.layer, name=name, macs=macs)
            sites[position] = site._replace(layer=layer)
    own = tuple(sites), tuple(skipped), tuple(products), tuple(lookups)
    return Network(flat, *own, paths)


def examples_of(flat: FlatJaxpr) -> int:
    """How many examples a network is traced at."""
    batch = max((shape(var)[0] for var in flat.inputs if shape(var)), default=1)
    return max(batch, 1)  # in this order: a symbolic size is at least 1, but may not be above


def _shared_by_steps(flat: FlatJaxpr, sites: Sequence[Site]) -> list[list[int]]:
    """The positions of the sites of every layer: of one place in a loop, with one kernel."""
    found: dict[Any, list[int]] = {}
    for position, site in enumerate(sites):
        result = flat.equations[site.chain[0]].outvars[0]
        found.setdefault((flat.places.get(result, result), site.kernel), []).append(position)
    return list(found.values())


def _alike(
    graph: Graph, found: Mapping[core.Var, jaxpr.Dependence], sites: Sequence[Site]
) -> list[Site]:
    """Sites with what all of them have: the first and the last step may be read otherwise."""
    if len(sites) == 1:
        return list(sites)
    first, *others = sites
    count = len(first.operations)
    for other in others:
        pairs = zip(first.operations, other.operations, strict=False)
        same = (_is_same(one, another) for one, another in pairs)
        common = len(list(itertools.takewhile(bool, same)))
        count = min(count, common if first.movement == other.movement else 0)
    is_cut = any(len(site.operations) > count for site in sites)
    keeps_activation = not is_cut and len({site.activation for site in sites}) == 1
    alike = []
    for site in sites:
        chain = affine_chain(graph, found, site.chain[0], site.layer.operation, count)
        site = _with_chain(site, chain)._replace(shortcut=None)
        if not keeps_activation:
            layer = dataclasses.replace(site.layer, activation=NONE.name)
            site = site._replace(
                layer=layer, activation=NONE, activating=(), activated=chain.output
            )
        alike.append(site)
    return alike


def _is_same(one: ChannelOperation, other: ChannelOperation) -> bool:
    operands = one.operand, other.operand
    if all(map(jaxpr.is_literal, operands)):
        is_one = np.array_equal(one.operand.val, other.operand.val)
    else:
        is_one = one.operand is other.operand
    return is_one and one._replace(operand=None) == other._replace(operand=None)


def _with_chain(site: Site, chain: Chain) -> Site:
    moves = tuple(Equations([e], jaxpr.variables(e.invars), e.outvars) for e in chain.movement)
    return site._replace(
        layer=dataclasses.replace(site.layer, output_shape=shape(chain.output)),
        chain=chain.positions,
        operations=chain.operations,
        movement=Movement(moves, dtype(chain.output)),
        output=chain.output,
    )


def values_of_steps(sites: Sequence[Site], values: Sequence[Any], axis: int | None) -> Any:
    """The values of a layer in all steps of a loop as one array, the steps along an axis.

    Args:
      sites: of the layer.
      values: by site.
      axis: along which its positions lie; None if there is one position alone, that of step 0.
    """
    return values[0] if len(sites) == 1 or axis is None else jnp.concatenate(values, axis)


def _element(
    graph: Graph, kernel: Any, leaf: int, found: Mapping[core.Var, jaxpr.Dependence]
) -> str:
    """Which element of a leaf a kernel is made of, e.g. `[3]`; empty if of more than one."""
    indices: list[int] = []
    while kernel in graph.writer:
        equation = graph.writer[kernel]
        sources = [
            var
            for var in jaxpr.variables(equation.invars)
            if leaf in jaxpr.depends_on([var], found).params
        ]
        if len(sources) != 1:
            return ""
        indices = [*jaxpr.single_indices(equation), *indices]
        [kernel] = sources
    return "".join(f"[{index}]" for index in indices)


def _refusal(equation: core.JaxprEqn, name: str) -> ValueError:
    primitive = equation.primitive.name
    remedy = _REMEDY.get(primitive, "call its body directly")
    return ValueError(
        f"layer {name!r} stands inside `{primitive}`, where it cannot be rewritten; {remedy}."
    )


def _skip(equation: core.JaxprEqn, reason: str) -> Skipped:
    return Skipped(equation.primitive.name, tuple(map(shape, equation.invars)), reason)


def _chosen_by_input(equation: core.JaxprEqn, operands: Sequence[jaxpr.Dependence]) -> str | None:
    """Why an equation that picks among params by the input stays in float, if it is one."""
    reads_params = any(operand.params_only for operand in operands)
    return _CHOOSING.get(equation.primitive.name) if reads_params else None


def _is_gathered(graph: Graph, found: Mapping[core.Var, jaxpr.Dependence], atom: Atom) -> bool:
    """Whether an operand is what the input picked among params, or moved elements of that."""
    while atom in graph.writer and graph.writer[atom].primitive.name in jaxpr.MOVEMENT:
        atom = graph.writer[atom].invars[0]
    writer = graph.writer.get(atom)
    if writer is None:
        return False
    operands = [jaxpr.depends_on([operand], found) for operand in writer.invars]
    return _chosen_by_input(writer, operands) is not None


def _site(
    graph: Graph,
    found: Mapping[core.Var, jaxpr.Dependence],
    position: int,
    operation: Linear,
    kernel_is_lhs: bool,
    name: str,
) -> Site:
    equation = graph.equations[position]
    operands: list[Any] = equation.invars[:: 1 if kernel_is_lhs else -1]
    kernel, x = operands
    chain = affine_chain(graph, found, position, operation)
    activation, activating, activated = find_activation(graph, chain.output)
    layer = Layer(
        name=name,
        kind=operation.kind,
        activation=activation.name,
        kernel_shape=shape(kernel),
        input_shape=shape(x),
        output_shape=shape(chain.output),
        macs=math.prod(shape(equation.outvars[0])) * operation.matrix_shape[1],
        operation=operation,
    )
    moves = tuple(Equations([e], jaxpr.variables(e.invars), e.outvars) for e in chain.movement)
    return Site(
        layer=layer,
        input=x,
        kernel=kernel,
        chain=chain.positions,
        operations=chain.operations,
        movement=Movement(moves, dtype(chain.output)),
        output=chain.output,
        activation=activation,
        activated=activated,
        activating=activating,
        shortcut=_shortcut(graph, found, chain.output),
    )


def _shortcut(
    graph: Graph, found: Mapping[core.Var, jaxpr.Dependence], output: core.Var
) -> Shortcut | None:
    reader = graph.only_reader(output)
    if reader is None or graph.equations[reader].primitive.name != "add":
        return None
    others: list[Any] = [a for a in graph.equations[reader].invars if a is not output]
    is_value = len(others) == 1 and jaxpr.depends_on(others, found).x
    if not is_value or shape(others[0]) != shape(output):
        return None
    return Shortcut(
        others[0], find_activation(graph, graph.equations[reader].outvars[0]).activation
    )
