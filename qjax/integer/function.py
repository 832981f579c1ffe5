"""The integer evaluation of a quantized network: int8 operands, int32 accumulators, int8 codes.

Every layer computes acc = q_b + Σ q_w·(q_x − z_x) in int32 and its output codes are
clip(acc·M + z_y, qmin, qmax) with M = s_w·s_x / s_y, in one of `ARITHMETICS`; where the kernel
contains the scales of the input, M = s_w / s_y. Between layers a value is codes on one grid,
real = s·(q − z), or a sum on a finer one (see `qjax.integer.codes` and `qjax.integer.rules`):

* a layer whose input codes lie on another grid than its own requantizes them, M = s / s_x;
* a layer whose input is a sum requantizes that to its input codes;
* in integer arithmetics, layer outputs without codes (`outputs=None`) are sums too, on the grid
  max_c(s_w·s_x)·L / 2^30.

In `float` arithmetic sums are float32, computed as fake quantization computes them, so that both
evaluations give the same codes.

In float32 whatever the arithmetic: quantizing the network's input, scaling its output, layers that
have no integer accumulator (weights or input in float, weights per group), and operations that
integers cannot express (tanh, softmax, products of activations in float) with what leads to the
next codes. Products of activations that have grids are int8 too: see `qjax.integer.matmul`.

Where the range of a layer's input is found at run time, so is s_x: the layer rounds its real input
to codes, sums their products in int32 and scales the sum in float32. That takes `float` arithmetic.
"""

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.formats.affine import QParams
from qjax.formats.dynamic import Dynamic
from qjax.formats.spec import in_table
from qjax.graph.jaxpr import Env
from qjax.graph.layers import Network, Site
from qjax.graph.matmuls import Matmul, find_matmuls
from qjax.graph.schedule import Step
from qjax.integer import lowerings
from qjax.integer.accumulator import Accumulator, check_accumulator
from qjax.integer.arguments import SMALL, Layout, packed
from qjax.integer.codes import GridKey, grid_key
from qjax.integer.constants import Constants, Spec, constants_of
from qjax.integer.lowerings import LOWERINGS, Lowering, Method
from qjax.integer.matmul import plan_matmul
from qjax.integer.requantize import ARITHMETICS, Arithmetic
from qjax.integer.rules import LayerPlan, Plan, Record, integer_rules
from qjax.quantize import Quantized
from qjax.run.function import QuantizedFunction, bind, outputs_of, steps_of
from qjax.run.interpreter import Rules, evaluate
from qjax.run.layer import QuantizedLayer
from qjax.run.matmul import QuantizedMatmul


def integer(
    q: Quantized,
    *,
    arithmetic: str | Arithmetic = "float",
    lowering: str | Method | Mapping[str, str | Method] | None = None,
    accumulator: Accumulator | Mapping[str, Accumulator] | None = None,
) -> "IntegerFunction":
    """Turns a quantized network into one that computes with integers.

    Args:
      q: the result of `qjax.quantize`.
      arithmetic: of requantization: `float`, `fixed_point`, `shift`, `floor` or `divide`, see
        `qjax.integer.requantize`, or an `Arithmetic`.
      lowering: how accumulators are computed, `int8`, `dot`, `uint8` or `float32` (see
        `qjax.integer.lowerings`), for all layers or by layer name; by default the fastest one of a
        table, which uses `float32` in `float` arithmetic only. It does not change the result.
      accumulator: narrower accumulators to simulate, for all layers or by layer name.

    Returns:
      A pure function of (q.params, x) that returns what `q.apply_fn` returns. Lowerings are chosen
      for the codes in `q.params`; call it with these.

    Raises:
      ValueError: an unknown arithmetic, lowering or layer name; an accumulator that does not fit 32
        bits; weights whose values are no integers times a scale. When called: a lowering that
        cannot compute a layer, or not exactly.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> params = {"dense": jnp.array([[0.5, -1.0], [1.0, 0.25]])}
      >>> x = jnp.array([[1.0, 2.0], [3.0, -4.0]])
      >>> q = qjax.quantize(lambda params, x: x @ params["dense"], params, x, bits=8)
      >>> run = qjax.integer(q, arithmetic="fixed_point")
      >>> run.codes(q.params, x)["dense"].dtype.name
      'uint8'
      >>> bool(jnp.all(run(q.params, x) == q.apply_fn(q.params, x)))
      True
    """
    layers: Mapping[str, QuantizedLayer] = q.params["layers"]
    by_name = lowering if isinstance(lowering, Mapping) else dict.fromkeys(layers, lowering)
    _check_names("lowering", by_name, layers)
    methods = {
        name: in_table("lowering", given, LOWERINGS)
        for name, given in by_name.items()
        if given is not None
    }
    narrow = (
        dict.fromkeys(layers, accumulator)
        if isinstance(accumulator, Accumulator)
        else dict(accumulator or {})
    )
    _check_names("accumulator", narrow, layers)
    for given in narrow.values():
        check_accumulator("accumulator", given)
    chosen = in_table("arithmetic", arithmetic, ARITHMETICS)
    for name, layer in layers.items():
        _check_weights(name, layer)
        _check_dynamic(name, layer, chosen, narrow)
        if _sums_codes(layer) and lowerings.largest(layer) >= lowerings.INT_LIMIT:
            raise ValueError(_beyond_32_bits(name, layer))
    sums = tuple((name, _key(grid)) for name, grid in q.params.get("sums", {}).items())
    matmuls = q.params.get("matmuls", {})
    return IntegerFunction(q.apply_fn, layers, chosen, methods, narrow, sums, matmuls)


def _key(grid: QParams) -> GridKey:
    key = grid_key(grid)
    assert key is not None
    return key


def _sums_codes(layer: QuantizedLayer) -> bool:
    return layer.has_integer_accumulator or layer.sums_dynamic_codes


def _beyond_32_bits(name: str, layer: QuantizedLayer) -> str:
    """Says what of a layer does not fit an accumulator, and what to do about it."""
    low, high = lowerings.worst_case(layer)
    if max(-int(low.min()), int(high.max())) >= lowerings.INT_LIMIT or layer.sums_dynamic_codes:
        return (
            f"layer {name!r} can reach {lowerings.largest(layer):,} in its accumulator, beyond 32 "
            "bits; use fewer bits for its weights or its inputs."
        )
    bias = np.asarray(layer.bias, np.int64)
    return (
        f"layer {name!r} has a bias of {int(abs(bias).max()):,} in its accumulator, in channel "
        f"{int(abs(bias).argmax())}, which leaves its products no room in 32 bits: the scale of "
        "that channel's weights is too small for it; quantize again, which raises such scales."
    )


def _check_weights(name: str, layer: QuantizedLayer) -> None:
    """Refuses kernels whose values are no integers times a scale."""
    if layer.weights is not None and not layer.weights.is_uniform:
        raise ValueError(
            f"layer {name!r} has weights in the format {layer.weights.name}, whose values are no "
            "integers times a scale; use `q.apply_fn`, or quantize with weight_format='uniform', "
            "'power_of_two' or 'apot'."
        )


def _check_dynamic(
    name: str, layer: QuantizedLayer, arithmetic: Arithmetic, narrow: Mapping[str, Accumulator]
) -> None:
    """Refuses what needs the range of a layer's tensors beforehand."""
    formats = {"input": layer.inputs, "output": layer.outputs or layer.activated}
    found = [tensor for tensor, format in formats.items() if isinstance(format, Dynamic)]
    if found and arithmetic.only_integers:
        raise ValueError(
            f"`arithmetic` {arithmetic.name} needs ranges that are known beforehand, and layer "
            f"{name!r} finds that of its {' and '.join(found)} at run time; use float, or quantize "
            "with static ranges."
        )
    if "input" in found and name in narrow:
        raise ValueError(
            f"`accumulator` cannot be simulated for layer {name!r}, which finds the range of its "
            "input at run time; quantize with static ranges."
        )


def _check_names(argument: str, given: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    for name in given.keys() - layers.keys():
        raise ValueError(
            f"`{argument}` names {name!r}, which is no layer; the layers are {', '.join(layers)}."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerFunction:
    """A quantized network in integer arithmetic: call it with quantized params and an input.

    Functions of equal quantizations of one network share their compiled programs.

    Attributes:
      function: the same network in fake quantization.
      layers: the layers whose codes it was made for.
      arithmetic: of requantization.
      methods: the lowering that was asked for, by layer; the fastest for those without one.
      narrow: the accumulators to simulate, by layer.
      sums: the grids of junctions, by name.
      matmuls: the quantized products of two activations, by name.
    """

    function: QuantizedFunction
    layers: Mapping[str, QuantizedLayer]
    arithmetic: Arithmetic
    methods: Mapping[str, Method]
    narrow: Mapping[str, Accumulator]
    sums: tuple[tuple[str, GridKey], ...] = ()
    matmuls: Mapping[str, QuantizedMatmul] = dataclasses.field(default_factory=dict)
    _plans: MutableMapping[Network, dict[bool, Plan]] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )
    _found: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Mapping[str, Any], x: Any) -> Any:
        """Evaluates the network, compiled once per shape of `x`.

        What depends on params alone is computed once per params, not once per call, unless they are
        traced from outside.

        Args:
          params: `Quantized.params`.
          x: an input like the ones of the original function, of any batch size.

        Returns:
          What the original function returns.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized; a
            lowering that cannot compute a layer, or not exactly.
        """
        return self._run(_outputs, params, x)

    def codes(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        """Evaluates the network for the codes of every layer's pre-activation output, by name.

        Args:
          params: as in a call.
          x: as in a call.

        Returns:
          Integers from qmin to qmax; layers whose output is in float, or has another grid for every
          input, are left out.
        """
        return self._run(_codes, params, x)

    def accumulators(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        """Evaluates the network for the accumulator of every layer, bias included, by name.

        Args:
          params: as in a call.
          x: as in a call.

        Returns:
          int32[...] in the layout of each layer's operation; layers without an integer accumulator,
          or whose bias is not part of it as their input's range is found at run time, are left out.
        """
        return self._run(_accumulators, params, x)

    def lowerings(self, x: Any) -> dict[str, Lowering]:
        """How the accumulator of each layer is computed.

        Args:
          x: an input, or its shape.

        Returns:
          A `Lowering` by name, without the layers that have no integer accumulator.
        """
        plans = self._plan(self.function.network(x)).layers
        return {name: plan.lowering for name, plan in plans if plan.lowering is not None}

    def _run(self, function: Callable[..., Any], params: Mapping[str, Any], x: Any) -> Any:
        network = self.function.network(x)
        plan, layout, arrays = self._prepared(network, params, _is_traced(x))
        whole = partial(_of_arrays, function, network, plan, layout)
        return network.program((function, plan, layout), whole)(arrays, x)

    def _prepared(
        self, network: Network, params: Mapping[str, Any], is_traced: bool
    ) -> tuple[Plan, Layout, dict[str, jax.Array]]:
        """What a program takes for params and their constants; remembered for the last params.

        Args:
          network: the network.
          params: as in a call.
          is_traced: whether the input is.
        """
        parts = [part for named in params.values() for part in named.values()]
        key = tuple(map(id, parts))
        kept = self._found.get(key)
        are_known = kept is not None or not _is_traced(params)
        if kept is None:
            kept = parts, {}
            if are_known:
                self._found.clear()
                self._found[key] = kept
        is_traced = is_traced or not are_known
        plan, prepared = self._plan(network, is_traced), kept[1]
        if (plan, is_traced) not in prepared:
            with jax.ensure_compile_time_eval() if are_known else contextlib.nullcontext():
                tree = params, self._constants(network, plan, params)
                prepared[plan, is_traced] = packed(tree, 0 if is_traced else SMALL)
        return plan, *prepared[plan, is_traced]

    def _plan(self, network: Network, is_traced: bool = False) -> Plan:
        """What the programs of a network depend on; remembered as long as the network is.

        Args:
          network: the network.
          is_traced: whether the call is traced from outside, maybe for an export.
        """
        plans = self._plans.setdefault(network, {})
        if is_traced not in plans:
            sites = network.first_sites
            layers = ((site.layer.name, self._layer_plan(site, is_traced)) for site in sites)
            matmuls = tuple(
                (step.name, plan_matmul(step, self.matmuls[step.name]))
                for step in (find_matmuls(network) if self.matmuls else ())
                if step.name in self.matmuls
            )
            plans[is_traced] = Plan(self.arithmetic, tuple(layers), self.sums, matmuls)
        return plans[is_traced]

    def _layer_plan(self, site: Site, is_traced: bool) -> LayerPlan:
        layer = self.layers[site.layer.name]
        is_sum = layer.has_integer_accumulator and layer.outputs is None
        return LayerPlan(
            self._lowering(site, is_traced) if _sums_codes(layer) else None,
            grid_key(layer.grid),
            grid_key(layer.outputs),
            grid_key(layer.activated),
            max(lowerings.largest(layer), 1) if is_sum and self.arithmetic.only_integers else 0,
            self.narrow.get(site.layer.name),
        )

    def _lowering(self, site: Site, is_traced: bool) -> Lowering:
        name, only_integers = site.layer.name, self.arithmetic.only_integers
        layer, method = self.layers[name], self.methods.get(name)
        operation = site.layer.operation.channels_last
        table = lowerings.fastest_on(jax.default_backend(), only_portable=is_traced)
        try:
            return lowerings.choose(operation, layer, method, table, only_integers)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}.") from error

    def _constants(
        self, network: Network, plan: Plan, params: Mapping[str, Any]
    ) -> dict[str, Constants]:
        """The constants of the layers."""
        layers: Mapping[str, QuantizedLayer] = params["layers"]
        layouts = ((site.layer.name, site.layer.operation) for site in network.first_sites)
        operations = {name: operation.channels_last for name, operation in layouts}
        specs = tuple(
            Spec(name, operations[name], planned.lowering_of_sum.method)
            for name, planned in plan.layers
            if planned.lowering_of_sum and layers[name].has_integer_accumulator
        )
        return constants_of(specs, layers)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


# ---- What a program returns

Watch = Callable[[Step, Env], None]


def _of_arrays(
    function: Callable[..., Any],
    network: Network,
    plan: Plan,
    layout: Layout,
    arrays: Mapping[str, jax.Array],
    x: Any,
) -> Any:
    params, constants = layout.unpacked(arrays)
    return function(network, plan, params, constants, x)


def _evaluated(
    network: Network,
    plan: Plan,
    params: Mapping[str, Any],
    constants: Mapping[str, Constants],
    x: Any,
    record: Record | None = None,
    watch: Watch | None = None,
) -> tuple[Env, Rules]:
    rules = integer_rules(plan, constants, record)
    env = bind(network, params, x)
    steps, read = steps_of(network, params)
    evaluate(steps, env, read, rules, watch)
    return env, rules


def _outputs(network: Network, plan: Plan, params: Any, constants: Any, x: Any) -> Any:
    return outputs_of(network, *_evaluated(network, plan, params, constants, x))


def _codes(
    network: Network, plan: Plan, params: Any, constants: Any, x: Any
) -> dict[str, jax.Array]:
    found: dict[str, list[jax.Array]] = collections.defaultdict(list)

    def watch(step: Step, env: Env) -> None:
        match step:
            case Site(layer=layer):
                name, outputs = layer.name, params["layers"][layer.name].outputs
            case Matmul():
                name, outputs = step.name, params["matmuls"][step.name].outputs
            case _:
                return
        if isinstance(outputs, QParams):
            offset = outputs.qmin - lowerings.signed(outputs).qmin
            codes = env[step.output].codes.astype(jnp.int32) + offset
            found[name].append(codes.astype(outputs.dtype))

    _evaluated(network, plan, params, constants, x, watch=watch)
    sites = {site.layer.name: site for site in network.first_sites}
    return {
        name: sites[name].outputs_of_all_steps(codes) if name in sites else codes[0]
        for name, codes in found.items()
    }


def _accumulators(
    network: Network, plan: Plan, params: Any, constants: Any, x: Any
) -> dict[str, jax.Array]:
    found: dict[str, list[jax.Array]] = collections.defaultdict(list)

    def record(name: str, acc: jax.Array) -> None:
        found[name].append(acc.astype(jnp.int32))

    _evaluated(network, plan, params, constants, x, record=record)
    operations = {site.layer.name: site.layer.operation for site in network.first_sites}
    return {
        name: jnp.concatenate(steps, operations[name].output_order(steps[0].ndim)[0])
        for name, steps in found.items()
    }
