"""The integer evaluation of a quantized network: int8 operands, int32 accumulators, int8 codes.

Every layer computes acc = q_b + Σ q_w·(q_x − z_x) in int32 and its output codes are
clip(acc·M + z_y, qmin, qmax) with M = s_w·s_x / s_y, in one of the arithmetics of
`qjax.requantize`; where the kernel contains the scales of the input, M = s_w / s_y. Between layers
a value is codes on one grid, real = s·(q − z):

* reshapes, transpositions, slices, zero padding, concatenation on one grid and max-pooling act on
  codes as they are;
* ReLU and ReLU6 are clamps of codes, max(q, z); what clips off the grid is done as a sum is;
* a layer whose input codes lie on another grid than its own requantizes them, M = s / s_x.

Sums of values (residual adds, pools, concatenation across grids) need a finer grid than codes. In
integer arithmetics they are int32 with |v| ≤ 2^30 and zero_point 0: the operands of a sum, with
scales s_i and |q_i − z_i| ≤ L_i, go to the grid s = Σ s_i·L_i / 2^30, v = Σ (q_i − z_i)·s_i / s,
each term requantized in the same arithmetic; a sum over n elements is taken as it is if n·L < 2^31,
else on the grid s·L·n / 2^30; a division by a constant changes the scale alone. The next layer
requantizes the sum to its input codes. Layer outputs without codes (`outputs=None`) are such values
too, on the grid max_c(s_w·s_x)·L / 2^30. In `float` arithmetic sums are float32, computed as fake
quantization computes them, so that both evaluations give the same codes.

In float32 whatever the arithmetic: quantizing the network's input, scaling its output, layers that
have no integer accumulator (weights or input in float, weights per group), and operations that
integers cannot express (tanh, softmax, products of activations) with what leads to the next codes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from qjax.formats.affine import QParams, dequantize, quantize_array
from qjax.graph import jaxpr
from qjax.graph.layers import Network, Site, clip_bounds, find_layers
from qjax.graph.operation import along_channels, from_output_matrix
from qjax.integer import lowerings
from qjax.integer.accumulator import (
    MAX_BITS,
    MIN_BITS,
    Accumulator,
    Check,
    Overflow,
    fit,
    sum_term_by_term,
)
from qjax.integer.lowerings import Lowering, Method, signed
from qjax.integer.requantize import Arithmetic, requantize, to_codes
from qjax.quantize import Quantized
from qjax.run.function import Activated, QuantizedFunction, moved, schedule
from qjax.run.layer import QuantizedLayer, accumulator_scale, apply_linear

_WIDE = 2**30  # the greatest magnitude of a sum

# What acts on codes as on the values they stand for.
_MOVES = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "copy", "rev", "slice")
_MAXIMA = ("reduce_window_max", "reduce_max")
_SUMS = ("reduce_sum", "reduce_window_sum")


Grid = tuple[tuple[float, ...], tuple[int, ...], int, int]


class Codes(NamedTuple):
    """Integers that stand for real values: real = scale · (codes − zero_point).

    Attributes:
      codes: int8, int16 or int32.
      qparams: their grid, codes stored around 0: scalars; per channel where only a sum or one layer
        reads them.
      grid: (scales, zero points, qmin, qmax) of the grid as numbers, None for a sum.
    """

    codes: jax.Array
    qparams: QParams
    grid: Grid | None

    @property
    def limit(self) -> int:
        """What no |codes − zero_point| exceeds."""
        return self.qparams.qmax if self.grid is None else self.qparams.qmax - self.qparams.qmin

    @property
    def real(self) -> jax.Array:
        """The values in float32."""
        return dequantize(self.codes, self.qparams)

    @property
    def centered(self) -> jax.Array:
        """Codes less the zero point, int32."""
        return self.codes.astype(jnp.int32) - self.qparams.zero_point

    def replace(self, codes: jax.Array) -> "Codes":
        """Other codes on the same grid."""
        return self._replace(codes=codes)


def integer(
    q: Quantized,
    *,
    arithmetic: Arithmetic = "float",
    lowering: Method | Mapping[str, Method] | None = None,
    accumulator: Accumulator | Mapping[str, Accumulator] | None = None,
) -> "IntegerFunction":
    """Turns a quantized network into one that computes with integers.

    Args:
      q: what `qjax.quantize` returned.
      arithmetic: of requantization: `float`, `fixed_point`, `shift`, `floor` or `divide`, see
        `qjax.requantize`.
      lowering: how accumulators are computed, `int8`, `dot` or `float32` (see `qjax.lowerings`),
        for all layers or by layer name; by default the fastest one of a table, which uses `float32`
        in `float` arithmetic only. It does not change the result.
      accumulator: narrower accumulators to simulate, for all layers or by layer name.

    Returns:
      A pure function of (q.params, x) that returns what `q.apply_fn` returns. Lowerings are chosen
      for the codes in `q.params`; call it with these.

    Raises:
      ValueError: an unknown arithmetic, lowering or layer name; an accumulator that does not fit 32
        bits. When called: a `float32` lowering that would not be exact.
    """
    _check_choice("arithmetic", arithmetic, get_args(Arithmetic))
    layers: Mapping[str, QuantizedLayer] = q.params["layers"]
    by_name: Mapping[str, Method | None] = (
        lowering if isinstance(lowering, Mapping) else dict.fromkeys(layers, lowering)
    )
    _check_names("lowering", by_name, layers)
    for method in by_name.values():
        _check_choice("lowering", method, (None, *get_args(Method)))
    narrow: Mapping[str, Accumulator] = (
        dict.fromkeys(layers, accumulator)
        if isinstance(accumulator, Accumulator)
        else accumulator or {}
    )
    _check_names("accumulator", narrow, layers)
    for chosen in narrow.values():
        if not MIN_BITS <= chosen.bits <= MAX_BITS:
            raise ValueError(
                f"`accumulator` must have {MIN_BITS} to {MAX_BITS} bits; got {chosen.bits}."
            )
        _check_choice("accumulator.overflow", chosen.overflow, get_args(Overflow))
        _check_choice("accumulator.check", chosen.check, get_args(Check))
    for name, layer in layers.items():
        if layer.has_integer_accumulator and lowerings.largest(layer) >= lowerings.INT_LIMIT:
            raise ValueError(
                f"layer {name!r} can reach {lowerings.largest(layer):,} in its accumulator, beyond "
                "32 bits; use fewer bits for its weights or its inputs."
            )
    return IntegerFunction(q.apply_fn, layers, by_name, arithmetic, narrow)


def _check_names(argument: str, given: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    for name in given.keys() - layers.keys():
        raise ValueError(
            f"`{argument}` names {name!r}, which is no layer; the layers are {', '.join(layers)}."
        )


def _check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ValueError(f"`{argument}` must be one of {names}; got {value!r}.")


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerFunction:
    """A quantized network in integer arithmetic: call it with quantized params and an input.

    Attributes:
      function: the same network in fake quantization.
      layers: the layers whose codes it was made for.
      methods: the lowering that was asked for, by layer.
      arithmetic: of requantization.
      narrow: the accumulators to simulate, by layer.
    """

    function: QuantizedFunction
    layers: Mapping[str, QuantizedLayer]
    methods: Mapping[str, Method | None]
    arithmetic: Arithmetic
    narrow: Mapping[str, Accumulator]
    _biases: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Mapping[str, Any], x: Any) -> Any:
        """Evaluates the network, compiled once per shape of `x`.

        The zero-point corrections are computed once per params, not once per call, unless the call
        is traced from outside.

        Args:
          params: `Quantized.params`.
          x: an input like the ones of the original function, of any batch size.

        Returns:
          What the original function returns.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized; a
            `float32` lowering that would not be exact.
        """
        return self._compiled(params, self._folded(params), x)

    def codes(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        """Evaluates the network for the codes of every layer's pre-activation output, by name.

        Args:
          params: as in a call.
          x: as in a call.

        Returns:
          Integers from qmin to qmax; layers whose output is in float are left out.
        """
        return self._compiled_codes(params, self._folded(params), x)

    def accumulators(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        """Evaluates the network for the accumulator of every layer, bias included, by name.

        Args:
          params: as in a call.
          x: as in a call.

        Returns:
          int32[...] in the layout of each layer's operation; layers without an integer accumulator
          are left out.
        """
        return self._compiled_accumulators(params, self._folded(params), x)

    def lowerings(self, x: Any) -> dict[str, Lowering]:
        """How the accumulator of each layer is computed.

        Args:
          x: an input, or its shape.

        Returns:
          A `Lowering` by name, without the layers that have no integer accumulator.
        """
        network = find_layers(self.function.apply_fn, self.function.params, x)
        names = [site.layer.name for site in network.sites]
        found = zip(names, map(self._lowering, network.sites), strict=True)
        return {name: lowering for name, lowering in found if lowering is not None}

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(self._evaluate)

    @functools.cached_property
    def _compiled_codes(self) -> Callable[..., Any]:
        return jax.jit(self._codes)

    @functools.cached_property
    def _compiled_accumulators(self) -> Callable[..., Any]:
        def run(*args: Any) -> dict[str, jax.Array]:
            return {name: acc.astype(jnp.int32) for name, acc in self._run(*args)[2].items()}

        return jax.jit(run)

    def _folded(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The biases with the zero-point corrections; remembered for the last params."""
        leaves = jax.tree.leaves(params["layers"])
        key = tuple(map(id, leaves))
        if key in self._biases:
            return self._biases[key][1]
        folded = jax.jit(_fold_biases)(params["layers"])
        if not any(isinstance(leaf, Tracer) for leaf in folded.values()):
            self._biases.clear()
            self._biases[key] = leaves, folded
        return folded

    def _evaluate(self, params: Mapping[str, Any], biases: Mapping[str, Any], x: Any) -> Any:
        network, env, _ = self._run(params, biases, x)
        flat = network.flat
        outputs = [_real(jaxpr.read(env, atom), atom) for atom in flat.outputs]
        return jax.tree.unflatten(flat.out_tree, outputs)

    def _codes(self, params: Mapping[str, Any], biases: Mapping[str, Any], x: Any) -> Any:
        network, env, _ = self._run(params, biases, x)
        found = {}
        for site in network.sites:
            outputs, value = params["layers"][site.layer.name].outputs, env[site.output]
            if outputs is not None:
                offset = outputs.qmin - lowerings.signed(outputs).qmin
                codes = value.codes.astype(jnp.int32) + offset
                found[site.layer.name] = codes.astype(outputs.dtype)
        return found

    def _run(
        self, params: Mapping[str, Any], biases: Mapping[str, jax.Array], x: Any
    ) -> tuple[Network, jaxpr.Env, dict[str, jax.Array]]:
        network, env = self.function.bound(params["rest"], x)
        accumulators: dict[str, jax.Array] = {}
        for step in schedule(network):
            match step:
                case Site(layer=described):
                    layer = params["layers"][described.name]
                    bias, value = biases.get(described.name), env[step.input]
                    env[step.output] = self._layer(step, layer, bias, value, accumulators)
                case Activated(site=site):
                    name, value = site.layer.name, env[site.activated]
                    activated = params["layers"][name].activated
                    if activated is not None:
                        env[site.activated] = self._to_grid(value, activated, name, "activated")
                case _:
                    values = [jaxpr.read(env, atom) for atom in step.invars]
                    results = self._equation(step, values)
                    if results is None:
                        reals = list(map(_real, values, step.invars))
                        results = jaxpr.bind(step, reals)
                    env.update(zip(step.outvars, results, strict=True))
        return network, env, accumulators

    # ---- Layers

    def _grid(self, name: str, field: str) -> Grid:
        qparams = getattr(self.layers[name], field)
        scale, zero_point = (np.ravel(leaf) for leaf in (qparams.scale, qparams.zero_point))
        return tuple(map(float, scale)), tuple(map(int, zero_point)), qparams.qmin, qparams.qmax

    def _lowering(self, site: Site) -> Lowering | None:
        name = site.layer.name
        layer = self.layers[name]
        if not layer.has_integer_accumulator:
            return None
        method, platform = self.methods.get(name), jax.default_backend()
        try:
            only_integers = self.arithmetic != "float"
            operation = site.layer.operation
            return lowerings.choose(operation, layer, method, platform, only_integers)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}.") from error

    def _layer(
        self,
        site: Site,
        layer: QuantizedLayer,
        bias: jax.Array | None,
        value: Any,
        accumulators: dict[str, jax.Array],
    ) -> Codes | jax.Array:
        """Evaluates a layer up to its pre-activation output; records its accumulator."""
        operation, name = site.layer.operation, site.layer.name
        lowering = self._lowering(site)
        if lowering is None:
            y = moved(site, apply_linear(operation, layer, _real(value, site.input)))
            return y if layer.outputs is None else self._to_grid(y, layer.outputs, name, "outputs")
        assert layer.inputs is not None and bias is not None
        x = self._to_grid(value, layer.inputs, name, "inputs")
        if name in self.narrow:
            acc = self._narrow(site, layer, bias, x, self.narrow[name])
        else:
            acc = self.accumulate(site, layer, bias, x, lowering)
        acc = acc if self.arithmetic == "float" else acc.astype(jnp.int32)
        accumulators[name] = acc
        scale = accumulator_scale(operation, layer)
        if layer.outputs is not None:
            qparams, grid = signed(layer.outputs), self._grid(name, "outputs")
        elif self.arithmetic == "float":
            scale = along_channels(operation, scale, acc.ndim)
            return moved(site, acc.astype(jnp.float32) * scale)
        else:
            limit = max(lowerings.largest(self.layers[name]), 1)
            qparams, grid = _wide(jnp.max(scale) * float(limit)), None
        multiplier = along_channels(operation, scale, acc.ndim) * qparams.inverse_scale
        if grid is None:
            codes = requantize(acc, multiplier, self.arithmetic)
        else:
            codes = to_codes(acc, multiplier, qparams, self.arithmetic)
        for equation in site.movement:
            if equation.primitive.name != "convert_element_type":
                [codes] = jaxpr.bind(equation, [codes])
        return Codes(codes, qparams, grid)

    def accumulate(
        self, site: Site, layer: QuantizedLayer, bias: jax.Array, x: Codes, lowering: Lowering
    ) -> jax.Array:
        """Computes a layer's accumulator in the layout of its operation's output.

        Args:
          site: where the layer stands.
          layer: its parameters.
          bias: its bias with the zero-point correction.
          x: its input.
          lowering: how.

        Returns:
          int32[...], or the same integers as float32.
        """
        operation = site.layer.operation
        operands = lowerings.operands(operation, layer, bias, lowering)
        return lowerings.accumulate(operation, operands, x.codes, x.qparams.zero_point, lowering)

    def _narrow(
        self, site: Site, layer: QuantizedLayer, bias: jax.Array, x: Codes, accumulator: Accumulator
    ) -> jax.Array:
        """Computes a layer's sums as a narrower accumulator holds them."""
        operation = site.layer.operation
        if accumulator.check == "sum" or accumulator.overflow == "wrap":
            acc = self.accumulate(site, layer, bias, x, Lowering("int8"))
            return fit(acc, accumulator)
        kernel = lowerings.operands(operation, layer, bias, Lowering("dot")).kernel
        kernel = kernel.astype(jnp.int32)
        shape = jax.eval_shape(
            lambda x, kernel: operation.apply(x, operation.from_matrix(kernel)), x.centered, kernel
        ).shape
        groups, _, channels = kernel.shape
        acc = sum_term_by_term(
            operation.patches(x.centered),
            kernel,
            layer.bias.reshape(groups, channels),
            accumulator,
        )
        return from_output_matrix(operation, acc, shape)

    def _to_grid(self, value: Any, qparams: QParams, name: str, field: str) -> Codes:
        """Brings a value to the codes of a layer's input or output."""
        grid, qparams = self._grid(name, field), signed(qparams)
        if isinstance(value, Codes) and value.grid == grid:
            return value
        if not isinstance(value, Codes) or self.arithmetic == "float":
            real = value.real if isinstance(value, Codes) else value
            return Codes(quantize_array(real, qparams), qparams, grid)
        multiplier = value.qparams.scale / qparams.scale
        codes = to_codes(value.centered, multiplier, qparams, self.arithmetic)
        return Codes(codes, qparams, grid)

    # ---- Equations between layers

    def _equation(self, equation: core.JaxprEqn, values: list[Any]) -> list[Any] | None:
        """Evaluates an equation on integers, None where that cannot be done."""
        if not any(isinstance(value, Codes) for value in values):
            return None
        name, first = equation.primitive.name, values[0]
        if len(jaxpr.variables(equation.invars)) == 1 and isinstance(first, Codes):
            if name in (*_MOVES, *_MAXIMA):
                return [first.replace(array) for array in jaxpr.bind(equation, [first.codes])]
            if name == "convert_element_type":
                is_float = jnp.issubdtype(jaxpr.dtype(equation.outvars[0]), jnp.floating)
                return [first] if is_float else None
            if name == "pad" and _number(equation.invars[1]) == 0:
                zero = first.qparams.zero_point.astype(first.codes.dtype)
                return [first.replace(jaxpr.bind(equation, [first.codes, zero])[0])]
        if name == "concatenate" and all(isinstance(value, Codes) for value in values):
            if len({value.grid for value in values}) == 1 and first.grid:
                codes = jaxpr.bind(equation, [value.codes for value in values])
                return [first.replace(array) for array in codes]
        clipped = self._clip(equation, values)
        if clipped is not None:
            return [clipped]
        return None if self.arithmetic == "float" else self._sum(equation, values)

    def _clip(self, equation: core.JaxprEqn, values: list[Any]) -> Codes | None:
        """Clamps codes to bounds that are on their grid, or a sum to any."""
        variables = jaxpr.variables(equation.invars)
        [value] = [v for v in values if isinstance(v, Codes)][:1]
        if len(variables) != 1 or len(equation.outvars) != 1:
            return None
        bounds = clip_bounds(equation, {variables[0]: (-math.inf, math.inf)})
        if bounds is None:
            return None
        low, high = bounds
        codes, zero_point = value.codes, value.qparams.zero_point.astype(value.codes.dtype)
        if value.grid is not None and low in (-math.inf, 0.0) and high >= _greatest(value.grid):
            return value.replace(jnp.maximum(codes, zero_point) if low == 0.0 else codes)
        if self.arithmetic == "float":
            return None
        value = self._common([value])[0]
        limits = [jnp.round(jnp.clip(b / value.qparams.scale, -_WIDE, _WIDE)) for b in bounds]
        return value.replace(jnp.clip(value.codes, *(limit.astype(jnp.int32) for limit in limits)))

    def _sum(self, equation: core.JaxprEqn, values: list[Any]) -> list[Codes] | None:
        """Adds and scales on a grid for sums, see the module."""
        name, value = equation.primitive.name, values[0]
        if name in ("mul", "div"):
            factor = _number(equation.invars[1])
            if not isinstance(value, Codes) or factor is None or factor <= 0:
                return None
            scale = value.qparams.scale
            scale = scale * factor if name == "mul" else scale / factor
            sum_ = value if value.grid is None else self._exact(value)
            return [sum_._replace(qparams=dataclasses.replace(sum_.qparams, scale=scale))]
        if not all(isinstance(value, Codes) for value in values):
            return None
        if name in ("add", "add_any", "sub", "concatenate"):
            codes = [value.codes for value in self._common(values, adds=name != "concatenate")]
            qparams = self._common_grid(values, adds=name != "concatenate")
            return [Codes(jaxpr.bind(equation, codes)[0], qparams, None)]
        if name in _SUMS:
            shapes = jaxpr.shape(equation.invars[0]), jaxpr.shape(equation.outvars[0])
            window = equation.params.get("window_dimensions")
            count = math.prod(window) if window else math.prod(shapes[0]) // math.prod(shapes[1])
            sum_ = self._exact(value)
            if count * sum_.limit >= 2**31:
                qparams = _wide(value.qparams.scale * float(count * value.limit))
                multiplier = value.qparams.scale / qparams.scale
                codes = requantize(value.centered, multiplier, self.arithmetic)
                sum_ = Codes(codes, dataclasses.replace(qparams, qmax=_WIDE // count), None)
            limit = count * sum_.limit
            qparams = dataclasses.replace(sum_.qparams, qmin=-limit, qmax=limit)
            return [Codes(jaxpr.bind(equation, [sum_.codes])[0], qparams, None)]
        return None

    def _exact(self, value: Codes) -> Codes:
        """The same integers with zero_point 0."""
        zero = jnp.zeros_like(value.qparams.zero_point)
        qparams = QParams(value.qparams.scale, zero, -value.limit, value.limit)
        return Codes(value.centered, qparams, None)

    def _common_grid(self, values: list[Codes], adds: bool = True) -> QParams:
        ranges = [jnp.max(value.qparams.scale) * float(value.limit) for value in values]
        return _wide(sum(ranges[1:], ranges[0]) if adds else jnp.max(jnp.stack(ranges)))

    def _common(self, values: list[Codes], adds: bool = True) -> list[Codes]:
        """The values on one grid that holds them, or their sum."""
        qparams = self._common_grid(values, adds)

        def rescaled(value: Codes) -> Codes:
            multiplier = value.qparams.scale / qparams.scale
            return Codes(requantize(value.centered, multiplier, self.arithmetic), qparams, None)

        return [rescaled(value) for value in values]


def _wide(greatest: jax.Array) -> QParams:
    """The grid of a sum whose magnitude is at most `greatest`, in real units."""
    return QParams(greatest / _WIDE, jnp.zeros((), jnp.int32), -_WIDE, _WIDE)


def _fold_biases(layers: Mapping[str, QuantizedLayer]) -> dict[str, jax.Array]:
    return {
        name: lowerings.folded_bias(layer)
        for name, layer in layers.items()
        if layer.has_integer_accumulator
    }


def _real(value: Any, atom: jaxpr.Atom) -> Any:
    """A value in real units, of the type that its readers expect."""
    return value.real.astype(jaxpr.dtype(atom)) if isinstance(value, Codes) else value


def _number(atom: jaxpr.Atom) -> float | None:
    is_scalar = jaxpr.is_literal(atom) and np.ndim(atom.val) == 0
    return float(atom.val) if is_scalar else None


def _greatest(grid: Grid) -> float:
    (scale,), (zero_point,), _, qmax = grid
    return float(np.float32(scale) * np.float32(qmax - zero_point))
