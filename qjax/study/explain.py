"""One layer followed step by step: what its integer arithmetic does to a real image.

The steps are those of Jacob et al., 2018, arXiv:1712.05877, section 2, done in 64-bit integers:
acc = Σ (q_w − z_w)(q_x − z_x) + q_b, then q_y = clip(round(M·acc) + z_y) with M = s_w·s_x / s_y in
fixed point, M = M0 / 2^shift (`qjax.requantize`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams, quantize_array
from qjax.graph.layers import Site, find_layers
from qjax.graph.operation import by_channel, output_matrix
from qjax.integer.accumulator import signed_width
from qjax.integer.requantize import fixed_point, multiply_shift
from qjax.quantize import Quantized
from qjax.run.layer import (
    QuantizedLayer,
    accumulator_scale,
    dequantized_bias,
    dequantized_kernel,
    fold_input_scales,
    relative_codes,
    scaled_kernel,
)
from qjax.run.tap import Tap, float_layers, shapes_of, tapped

SHOWN = 8  # elements of a patch that are written out
ACCUMULATOR_BITS = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a layer.

    Attributes:
      name: what happens.
      equation: the arithmetic.
      number: the type of the result, e.g. uint8.
      bits: its width, 32 in float.
      values: some of the results, codes or real values.
      sqnr_db: signal to noise of all the results against the float network; None where there is
        nothing to compare with.
      note: what else is to be said.
    """

    name: str
    equation: str
    number: str
    bits: int
    values: tuple[float, ...]
    sqnr_db: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A layer on an image, step by step; `str(explanation)` is the text.

    Attributes:
      layer: the name of the layer.
      kind: conv, depthwise_conv, grouped_conv, dense or grouped_dense.
      kernel_shape: shape of its kernel.
      activation: what follows it: none, relu, relu6 or other.
      channel: the output channel that is shown.
      position: the output position that is shown, counted over the examples and space.
      elements: the elements of its patch that are shown, those with the largest products.
      patch: how many elements a patch has.
      steps: in order.
    """

    layer: str
    kind: str
    kernel_shape: tuple[int, ...]
    activation: str
    channel: int
    position: int
    elements: tuple[int, ...]
    patch: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        shape = "×".join(map(str, self.kernel_shape))
        shown = ", ".join(map(str, self.elements))
        lines = [
            f"{self.layer}: {self.kind} {shape}, activation {self.activation}",
            f"shown: output channel {self.channel} at position {self.position};",
            f"of the {self.patch} elements of its patch those with the largest products: {shown}",
        ]
        for index, step in enumerate(self.steps, 1):
            quality = "" if step.sqnr_db is None else _db(step.sqnr_db)
            lines += ["", f"{index:2}  {step.name:<34} {step.number:<24} {quality:>12}".rstrip()]
            lines.append(f"    {step.equation}")
            if step.values:
                lines.append(f"    {'  '.join(map(_number, step.values))}")
            lines += [f"    {line}" for line in step.note.splitlines()]
        return "\n".join(lines)


def explain(q: Quantized, layer: str, x: Any, params: Any = None) -> Explanation:
    """Follows one layer of a quantized network step by step.

    Args:
      q: a quantized network.
      layer: the name of one of its layers.
      x: an input with a leading axis of examples, usually of one.
      params: the float params, to compare every step with the float network. Without them the
        reference is the layer itself, unrounded at the input it gets: the kernel counts as exact.

    Returns:
      An `Explanation`.

    Raises:
      ValueError: there is no such layer.
    """
    function = q.apply_fn
    network = find_layers(function.apply_fn, function.params, shapes_of(x))
    sites = {site.layer.name: site for site in network.sites}
    if layer not in sites:
        raise ValueError(f"`layer` must be one of {', '.join(sites)}; got {layer!r}.")
    run = tapped(function.apply_fn, function.params, x, [layer])
    site, quantized = sites[layer], q.params["layers"][layer]
    actual = run(q.params, x)[1][layer]
    if params is None:
        operation = site.layer.operation
        kernel = dequantized_kernel(operation, quantized)
        bias = dequantized_bias(operation, quantized)
        reference = _Reference(np.asarray(actual.input, np.float64), kernel, bias)
    else:
        floats = float_layers(network, params)
        given = run(floats, x)[1][layer]
        own = floats["layers"][layer]
        reference = _Reference(np.asarray(given.input, np.float64), own.kernel, own.bias)
    return _Walk(site, quantized, actual, reference, params is not None).explanation()


@dataclasses.dataclass(frozen=True)
class _Reference:
    input: np.ndarray
    kernel: Any
    bias: Any


class _Walk:
    """The state of one explanation: every intermediate result of the layer in float64."""

    def __init__(
        self,
        site: Site,
        layer: QuantizedLayer,
        actual: Tap,
        reference: _Reference,
        has_float: bool,
    ) -> None:
        self.site, self.layer, self.actual = site, layer, actual
        self.reference, self.has_float = reference, has_float
        operation = site.layer.operation
        self.kernel = np.asarray(reference.kernel, np.float64)
        bias = np.asarray(reference.bias, np.float64)
        groups, self.patch, channels = operation.matrix_shape
        self.x = self._patches(reference.input)
        self.y = _product(self.x, self.kernel)  # float, before the bias
        self.z = self.y + bias.reshape(groups, channels)
        flat = _activate(self.z, site.layer.activation).reshape(len(self.z), -1)
        self.position, self.channel = map(int, np.unravel_index(flat.argmax(), flat.shape))
        self.group, self.column = divmod(self.channel, channels)
        self.x_codes = self._patches(self._input_codes())
        self.w_codes = np.asarray(relative_codes(layer), np.float64)
        if layer.is_per_group:
            self.w_codes = np.asarray(scaled_kernel(layer), np.float64)
        terms = self._at_patch(self.x_codes) * self._at_kernel(self.w_codes)
        self.elements = np.sort(np.argsort(-np.abs(terms), kind="stable")[:SHOWN])
        self.terms = terms[self.elements]
        self.acc = _product(self.x_codes, self.w_codes)
        self.steps: list[Step] = []

    def explanation(self) -> Explanation:
        self._input()
        self._kernel()
        self._accumulate()
        self._output()
        layer = self.site.layer
        return Explanation(
            layer.name,
            layer.kind,
            layer.kernel_shape,
            layer.activation,
            self.channel,
            self.position,
            tuple(map(int, self.elements)),
            self.patch,
            tuple(self.steps),
        )

    # ---- Access

    def _patches(self, x: Any) -> np.ndarray:
        return np.asarray(
            self.site.layer.operation.patches(jnp.asarray(x, jnp.float32)), np.float64
        )

    def _at_patch(self, patches: np.ndarray) -> np.ndarray:
        return patches[self.position, self.group]

    def _at_kernel(self, kernel: np.ndarray) -> np.ndarray:
        return kernel[self.group, :, self.column]

    def _at_output(self, outputs: np.ndarray) -> tuple[float, ...]:
        return (float(outputs[self.position, self.group, self.column]),)

    def _at_channel(self, values: Any) -> float:
        """One value of those per output channel, or the only one."""
        groups, _, channels = self.site.layer.operation.matrix_shape
        values = np.broadcast_to(np.asarray(values), (1, groups, channels))
        return float(values[0, self.group, self.column])

    def _like_outputs(self, qparams: QParams) -> QParams:
        """Qparams per channel for outputs as [positions, groups, channels]."""
        operation = self.site.layer.operation
        if not qparams.scale.ndim:
            return qparams
        groups, _, channels = operation.matrix_shape
        return jax.tree.map(
            lambda leaf: by_channel(operation.channel_axes, leaf).reshape(1, groups, channels),
            qparams,
        )

    def _input_scales(self, inputs: QParams) -> np.ndarray:
        """The scale of every element of a patch, [groups or 1, patch or 1]."""
        if not inputs.scale.ndim:
            return np.asarray(inputs.scale, np.float64).reshape(1, 1)
        operation = self.site.layer.operation
        ones = jnp.ones((*operation.matrix_shape[:2], 1))
        return np.asarray(fold_input_scales(operation, inputs, ones), np.float64)[:, :, 0]

    def _shown(self, values: np.ndarray) -> tuple[float, ...]:
        return tuple(map(float, values[self.elements]))

    def _add(
        self,
        name: str,
        equation: str,
        number: str,
        values: tuple[float, ...],
        sqnr_db: float | None,
        note: str = "",
        bits: int = 32,
    ) -> None:
        self.steps.append(Step(name, equation, number, bits, values, sqnr_db, note))

    def _input_codes(self) -> np.ndarray:
        """The input's codes less the zero point; its real values where it stays in float."""
        inputs, x = self.layer.inputs, self.actual.input
        if inputs is None:
            return np.asarray(x, np.float64)
        return np.asarray(quantize_array(x, inputs), np.float64) - float(inputs.zero_point)

    # ---- Steps

    def _input(self) -> None:
        x = self._patches(self.actual.input)
        self._add(
            "input",
            "x, as the layers before leave it",
            "float32",
            self._shown(self._at_patch(x)),
            _sqnr_db(self.x, x) if self.has_float else None,
        )
        inputs = self.layer.inputs
        if inputs is None:
            return
        zero_point, scales = int(inputs.zero_point), self._input_scales(inputs)
        codes = self._at_patch(self.x_codes) + zero_point
        divisor, note = f"{scales[0, 0]:.6g}", _clipping(x / scales + zero_point, inputs)
        if self.layer.folds_input_scales:
            divisor = "s_x"
            note += (
                f"\n{inputs.scale.size} scales s_x from {scales.min():.4g} to {scales.max():.4g}, "
                "folded into the kernel"
            )
        self._add(
            "input codes",
            f"q_x = clip(round(x / {divisor}) + {zero_point}, {inputs.qmin}, {inputs.qmax})",
            _type(inputs),
            self._shown(codes),
            _sqnr_db(self.x, self.x_codes * scales),
            note,
            inputs.bits,
        )

    def _kernel(self) -> None:
        weights = self.layer.weights
        if self.has_float or weights is None:
            text = "w, batch norm and other factors per channel folded in"
            self._add("kernel", text, "float32", self._shown(self._at_kernel(self.kernel)), None)
        if weights is None:
            return
        scale, zero_point = (
            np.broadcast_to(
                np.asarray(leaf), (self.w_codes.shape[0], leaf.shape[1], self.w_codes.shape[2])
            )
            for leaf in (weights.scale, weights.zero_point)
        )
        s, z = (float(v[self.group, 0, self.column]) for v in (scale, zero_point))
        operation = self.site.layer.operation
        real = np.asarray(dequantized_kernel(operation, self.layer), np.float64)
        first = "" if not self.layer.is_per_group else " (the first group's scale)"
        codes = np.asarray(self.layer.kernel, np.float64)
        w = "w·s_x" if self.layer.folds_input_scales else "w"
        many = f"{weights.scale.size} scales from {scale.min():.4g} to {scale.max():.4g}"
        self._add(
            "kernel codes",
            f"q_w ≈ {w} / {s:.6g} + {z:.0f} in {weights.qmin} … {weights.qmax}{first}",
            _type(weights),
            self._shown(self._at_kernel(codes)),
            _sqnr_db(self.kernel, real) if self.has_float else None,
            f"{many if weights.scale.size > 1 else 'one scale'}; a sequential fit makes up for "
            "errors of its input,\nwhich moves the kernel further than rounding alone",
            weights.bits,
        )

    def _accumulate(self) -> None:
        layer, operation = self.layer, self.site.layer.operation
        scale = np.asarray(accumulator_scale(operation, layer), np.float64)
        self.scale = scale.reshape(self.acc.shape[1:])
        if not layer.has_integer_accumulator:
            why = (
                "its weights have several scales per sum" if layer.is_per_group else "not all codes"
            )
            self.acc = self.acc * self.scale + np.asarray(layer.bias, np.float64).reshape(
                self.scale.shape
            )
            self._add(
                "sum of products and bias",
                "y = Σ w·x + b",
                "float32",
                self._at_output(self.acc),
                _sqnr_db(self.z, self.acc),
                f"in float: {why}",
            )
            return
        assert layer.inputs is not None and layer.weights is not None
        low, high = (
            float(code - int(layer.inputs.zero_point))
            for code in (layer.inputs.qmin, layer.inputs.qmax)
        )
        largest = np.abs(self.w_codes).max() * max(-low, high)
        products = signed_width(-largest, largest)
        self._add(
            "products",
            "p = (q_w − z_w)(q_x − z_x)",
            f"{products} bits needed",
            tuple(map(float, self.terms)),
            None,
            f"{len(self.terms)} of {self.patch} products; together they make "
            f"{self.terms.sum():.0f} of the sum",
            products,
        )
        bounds = (
            np.minimum(self.w_codes * low, self.w_codes * high).sum(1),
            np.maximum(self.w_codes * low, self.w_codes * high).sum(1),
        )
        bias = np.asarray(layer.bias, np.float64).reshape(self.scale.shape)
        unit = self._unit
        self._add(
            "accumulator",
            f"a = Σ p over {self.patch} elements",
            f"int{ACCUMULATOR_BITS}",
            self._at_output(self.acc),
            _sqnr_db(self.y, self.acc * self.scale),
            f"{signed_width(bounds[0].min(), bounds[1].max())} bits needed for any input, "
            f"{signed_width(self.acc.min(), self.acc.max())} by this one, {ACCUMULATOR_BITS} used\n"
            f"one unit is {unit} = {self.scale[self.group, self.column]:.6g}, so a is "
            f"{self._at_output(self.acc * self.scale)[0]:.6g}",
            ACCUMULATOR_BITS,
        )
        self.acc = self.acc + bias
        needed = signed_width((bounds[0] + bias).min(), (bounds[1] + bias).max())
        self._add(
            "bias",
            f"a + q_b, q_b = round(b / ({unit})) = {bias[self.group, self.column]:.0f}",
            f"int{ACCUMULATOR_BITS}",
            self._at_output(self.acc),
            _sqnr_db(self.z, self.acc * self.scale),
            f"{needed} bits needed for any input; the real value is "
            f"{self._at_output(self.acc * self.scale)[0]:.6g}",
            ACCUMULATOR_BITS,
        )

    def _output(self) -> None:
        layer, activation = self.layer, self.site.layer.activation
        real = self.acc * self.scale if layer.has_integer_accumulator else self.acc
        target = self._activated_reference()
        if layer.outputs is not None:
            real = self._requantize(layer.outputs, real, target)
        else:
            self._add(
                "de-quantization",
                f"y = {self._unit}·a" if layer.has_integer_accumulator else "nothing to do",
                "float32",
                self._at_output(real),
                _sqnr_db(self.z, real),
            )
        if activation == "other":
            return self._unknown_activation()
        if activation != "none":
            is_free = layer.outputs is not None and float(layer.outputs.range[0].min()) >= 0
            real = _activate(real, activation)
            self._add(
                f"activation: {activation}",
                "nothing to do: the clamp at code 0 was the ReLU" if is_free else "y = act(y)",
                "codes" if layer.outputs is not None else "float32",
                self._at_output(real),
                None if target is None else _sqnr_db(target, real),
            )
        if layer.activated is not None:
            codes = np.asarray(quantize_array(jnp.asarray(real), layer.activated), np.float64)
            before, real = (
                real,
                (codes - float(layer.activated.zero_point)) * float(layer.activated.scale),
            )
            scale, zero_point = float(layer.activated.scale), int(layer.activated.zero_point)
            self._add(
                "output codes after the activation",
                f"q_y = clip(round(y / {scale:.6g}) + {zero_point}, {layer.activated.qmin}, "
                f"{layer.activated.qmax})",
                _type(layer.activated),
                self._at_output(codes),
                None if target is None else _sqnr_db(target, real),
                _clipping(before / scale + zero_point, layer.activated),
                layer.activated.bits,
            )
        last = layer.activated or layer.outputs
        if last is not None:
            own = self._like_outputs(last)
            scale, zero_point = map(self._at_channel, (own.scale, own.zero_point))
            self._add(
                "de-quantization",
                f"y = {scale:.6g}·(q_y − {zero_point:.0f})",
                "float32",
                self._at_output(real),
                None if target is None else _sqnr_db(target, real),
                "only where something other than a layer reads y (a residual sum, pooling, the "
                "output)\na layer that reads the codes folds s_y into its own multiplier",
            )

    def _unknown_activation(self) -> None:
        rounded = self.layer.activated
        note = "" if rounded is None else f"then rounded to {rounded.bits} bits"
        values = () if self.site.movement else self._at_output(self._network_output(True))
        self._add("activation: other", "y = act(y), on real values", "float32", values, None, note)

    def _network_output(self, is_activated: bool) -> np.ndarray:
        """What the network itself computes, [positions, groups, channels]."""
        value = self.actual.activated if is_activated else self.actual.output
        return np.asarray(output_matrix(self.site.layer.operation, value), np.float64)

    def _activated_reference(self) -> np.ndarray | None:
        activation = self.site.layer.activation
        return None if activation == "other" else _activate(self.z, activation)

    @property
    def _unit(self) -> str:
        """What one unit of the accumulator is."""
        return "s_w" if self.layer.folds_input_scales else "s_w·s_x"

    def _requantize(
        self, outputs: QParams, real: np.ndarray, target: np.ndarray | None
    ) -> np.ndarray:
        own = self._like_outputs(outputs)
        scale, zero_point = np.asarray(own.scale, np.float64), np.asarray(own.zero_point)
        activation = self.site.layer.activation
        if self.layer.has_integer_accumulator:
            multiplier = self.scale[None] / scale
            fixed, shift = fixed_point(jnp.float32(multiplier))
            acc = jnp.asarray(self.acc, jnp.int32)
            rounded = multiply_shift(acc, fixed, shift, rounds=True)
            scaled = np.asarray(rounded, np.float64)
            self._add(
                "requantization",
                f"round(M·a), M = {self._unit} / s_y = {self._at_channel(multiplier):.8g}",
                "int32",
                self._at_output(scaled),
                None,
                f"M in float32 = M0 / 2^shift = {self._at_channel(fixed):.0f} / "
                f"2^{self._at_channel(shift):.0f}: a product with a 31-bit integer and a shift",
            )
        else:
            scaled = np.rint(real / scale)
        wide = scaled + zero_point
        codes = np.clip(wide, outputs.qmin, outputs.qmax)
        y = (codes - zero_point) * scale
        after = _activate(y, activation) if target is not None else y
        note = _clipping(wide, outputs)
        if target is not None and activation != "none":
            note = f"{note}; compared with the float network behind the activation"
        self._add(
            "zero point and clamp",
            f"q_y = clip(round(M·a) + {self._at_channel(zero_point):.0f}, {outputs.qmin}, "
            f"{outputs.qmax}), s_y = {self._at_channel(scale):.6g}",
            _type(outputs),
            self._at_output(codes),
            _sqnr_db(self.z if target is None else target, after),
            f"{note}\n{self._agreement(codes, outputs)}",
            outputs.bits,
        )
        return y

    def _agreement(self, codes: np.ndarray, outputs: QParams) -> str:
        if self.site.movement or self.site.output is self.site.activated and self.layer.activated:
            return "not compared with the network's own codes, which are rounded again or moved"
        output = jnp.float32(self._network_output(False))
        network = np.asarray(quantize_array(output, self._like_outputs(outputs)))
        return f"equal to the network's own code in {np.mean(network == codes):.2%} of the outputs"


def _product(patches: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Σ_k x[p, g, k]·w[g, k, m] in float64, exact for integers below 2^53."""
    return np.einsum("pgk,gkm->pgm", patches, kernel, optimize=True)


def _activate(z: np.ndarray, activation: str) -> np.ndarray:
    match activation:
        case "relu":
            return np.maximum(z, 0)
        case "relu6":
            return np.clip(z, 0, 6)
        case _:
            return z


def _sqnr_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    signal, noise = np.sum(reference**2), np.sum((reference - approximation) ** 2)
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def _clipping(codes: np.ndarray, qparams: QParams) -> str:
    low, high = (
        np.mean(np.rint(codes) < qparams.qmin),
        np.mean(np.rint(codes) > qparams.qmax),
    )
    return f"clipped {low:.2%} below and {high:.2%} above"


def _type(qparams: QParams) -> str:
    return f"{'int' if qparams.qmin < 0 else 'uint'}{qparams.bits}"


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"
