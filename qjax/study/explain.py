"""One layer followed step by step: what its integer arithmetic does to a real image.

`qjax.study.layer_trace` measures the layer; here every step of its arithmetic is a function of that
measurement, which writes the step down or returns None where the layer does not have it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.formats.affine import QParams
from qjax.formats.base import Format
from qjax.formats.binary import Signs
from qjax.formats.fixed_point import q_formats
from qjax.formats.multiples import Multiples
from qjax.integer.accumulator import signed_width
from qjax.quantize import Quantized
from qjax.study.layer_trace import LayerTrace, measure_layer

ACCUMULATOR_BITS = FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class ExplainedStep:
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
      layer: the name of the layer, or of a quantized product of two activations.
      kind: conv, depthwise_conv, grouped_conv, dense, grouped_dense or matmul.
      kernel_shape: shape of its kernel; of a matmul, of its second operand.
      activation: what follows it: a name in `ACTIVATIONS`, or other.
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
    steps: tuple[ExplainedStep, ...]

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
      layer: the name of one of its layers, or of a quantized product of two activations.
      x: an input with a leading axis of examples, usually of one.
      params: the float params, to compare every step with the float network. Without them the
        reference is the layer itself, unrounded at the input it gets: the kernel counts as exact.

    Returns:
      An `Explanation`.

    Raises:
      ValueError: there is no such layer.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["dense"]["w"])
      >>> params = {"dense": {"w": jnp.array([[0.5, -1.0], [1.0, 0.25]])}}
      >>> x = jnp.array([[1.0, 2.0], [0.5, -0.55]])
      >>> q = qjax.quantize(apply_fn, params, x, qjax.Recipe().naive())
      >>> for step in qjax.explain(q, "dense", x, params).steps:
      ...     if "int" in step.number:
      ...         print(step.name, step.number, step.values)
      input codes uint8 (155.0, 255.0)
      kernel codes int8 (64.0, 127.0)
      accumulator int32 (31800.0,)
      bias int32 (31800.0,)
      requantization int32 (255.0,)
      zero point and clamp uint8 (255.0,)
    """
    trace = measure_layer(q, layer, x, params)
    described, shown = trace.site.layer, trace.shown
    _, patch, channels = described.operation.matrix_shape
    return Explanation(
        layer=described.name,
        kind=described.kind,
        kernel_shape=described.kernel_shape,
        activation=trace.activation,
        channel=shown.group * channels + shown.column,
        position=shown.position,
        elements=tuple(map(int, shown.elements)),
        patch=patch,
        steps=tuple(
            step
            for make in (MATMUL_STEPS if trace.is_matmul else STEPS)
            if (step := make(trace)) is not None
        ),
    )


# ---- Steps


def _input(trace: LayerTrace) -> ExplainedStep:
    return ExplainedStep(
        "input",
        "x, as the layers before leave it",
        "float32",
        FLOAT_BITS,
        trace.shown.of_patches(trace.patches),
        _sqnr_db(trace.float_patches, trace.patches) if trace.is_float_network else None,
    )


def _input_codes(trace: LayerTrace) -> ExplainedStep | None:
    inputs, scale = trace.layer.grid, trace.input_scale
    if isinstance(trace.layer.inputs, Signs):
        return _input_signs(trace, trace.layer.inputs)
    if inputs is None or scale is None:
        return None
    zero_point = int(inputs.zero_point)
    divisor, note = f"{scale[0, 0]:.6g}", _clipping(trace.patches / scale + zero_point, inputs)
    if trace.layer.folds_input_scales:
        divisor = "s_x"
        note += (
            f"\n{inputs.scale.size} scales s_x from {scale.min():.4g} to {scale.max():.4g}, "
            "folded into the kernel"
        )
    if trace.is_dynamic:
        note += "\nthe range is that of this input, found at run time"
    return ExplainedStep(
        "input codes",
        f"q_x = clip(round(x / {divisor}) + {zero_point}, {_limits(inputs)})",
        _type(inputs),
        inputs.bits,
        trace.shown.of_patches(trace.patches_q + zero_point),
        _sqnr_db(trace.float_patches, trace.patches_q * scale),
        note + _q_formats(inputs),
    )


def _input_signs(trace: LayerTrace, inputs: Signs) -> ExplainedStep:
    shift = np.asarray(inputs.shift)
    return ExplainedStep(
        "input signs",
        "x ≈ t + K·sign(x − t), K = mean |x − t| of the patch",
        "int1",
        inputs.bits,
        trace.shown.of_patches(trace.patches_q),
        None,
        f"{shift.size} shifts t from {shift.min():.4g} to {shift.max():.4g}, which the bias "
        f"answers for\nK = {abs(trace.shown.of_patches(trace.patches_q)[0]):.6g}; the sum is an "
        "exclusive or and a population count",
    )


def _kernel(trace: LayerTrace) -> ExplainedStep | None:
    if trace.layer.weights is not None and not trace.is_float_network:
        return None
    return ExplainedStep(
        "kernel",
        "w, batch norm and other factors per channel folded in",
        "float32",
        FLOAT_BITS,
        trace.shown.of_kernel(trace.float_kernel),
        None,
    )


def _kernel_codes(trace: LayerTrace) -> ExplainedStep | None:
    layer, weights = trace.layer, trace.layer.weights
    if weights is None:
        return None
    groups, _, channels = trace.kernel_q.shape

    def shown(leaf: Any) -> float:
        """Of the channel that is shown, the first group's."""
        spread = np.broadcast_to(np.asarray(leaf), (groups, leaf.shape[1], channels))
        return trace.shown.of_channels(spread[:, 0])

    scales, s = np.asarray(weights.step), shown(weights.step)
    w = "w·s_x" if layer.folds_input_scales else "w"
    first = " (the first group's scale)" if layer.is_per_group else ""
    if weights.is_uniform and not isinstance(weights, Multiples):
        z, low, high = shown(weights.zero_point), int(weights.qmin), int(weights.qmax)
        equation = f"q_w ≈ {w} / {s:.6g} + {z:.0f} in {low} … {high}{first}"
    else:
        equation = f"q_w: the code of {weights.name} nearest to {w} / {s:.6g}{first}"
    many = f"{scales.size} scales from {scales.min():.4g} to {scales.max():.4g}"
    return ExplainedStep(
        "kernel codes",
        equation,
        _type(weights),
        weights.bits,
        trace.shown.of_kernel(np.asarray(layer.kernel, np.float64)),
        _sqnr_db(trace.float_kernel, trace.kernel_hat) if trace.is_float_network else None,
        f"{many if scales.size > 1 else 'one scale'}; a sequential fit makes up for "
        "errors of its input,\nwhich moves the kernel further than rounding alone"
        f"{_q_formats(weights) if weights.is_uniform else ''}",
    )


def _float_sum(trace: LayerTrace) -> ExplainedStep | None:
    if trace.acc is not None:
        return None
    layer, why = trace.layer, "not all codes"
    if layer.weights is not None and not layer.has_scale_per_sum:
        several = "several scales per sum"
        found = several if layer.is_per_group else "values that are no multiples of a scale"
        why = f"its weights have {found}"
    if isinstance(layer.inputs, Signs):
        why = "every position has a magnitude K of its own"
    return ExplainedStep(
        "sum of products and bias",
        "y = Σ w·x + b",
        "float32",
        FLOAT_BITS,
        _at_output(trace, trace.real),
        _sqnr_db(trace.float_outputs, trace.real),
        f"in float: {why}",
    )


def _products(trace: LayerTrace) -> ExplainedStep | None:
    if trace.acc is None or trace.input_range is None:
        return None
    low, high = trace.input_range
    largest = np.abs(trace.kernel_q).max() * max(-low, high)
    bits = signed_width(-largest, largest)
    return ExplainedStep(
        "products",
        "p = (q_w − z_w)(q_x − z_x)",
        f"{bits} bits needed",
        bits,
        tuple(map(float, trace.products)),
        None,
        f"{len(trace.products)} of {trace.patches.shape[2]} products; together they make "
        f"{trace.products.sum():.0f} of the sum",
    )


def _accumulator(trace: LayerTrace) -> ExplainedStep | None:
    if trace.acc is None or trace.sum_range is None:
        return None
    low, high = trace.sum_range
    real = trace.sums * trace.unit
    return ExplainedStep(
        "accumulator",
        f"a = Σ p over {trace.patches.shape[2]} elements",
        f"int{ACCUMULATOR_BITS}",
        ACCUMULATOR_BITS,
        _at_output(trace, trace.sums),
        _sqnr_db(trace.float_sums, real),
        f"{signed_width(low.min(), high.max())} bits needed for any "
        f"{'first operand' if trace.is_matmul else 'input'}, "
        f"{signed_width(trace.sums.min(), trace.sums.max())} by this one, "
        f"{ACCUMULATOR_BITS} used\n"
        f"one unit is {_unit(trace)} = {trace.shown.of_channels(trace.unit):.6g}, so a is "
        f"{trace.shown.of_outputs(real):.6g}",
    )


def _bias(trace: LayerTrace) -> ExplainedStep | None:
    if trace.acc is None or trace.sum_range is None:
        return None
    low, high = (end + trace.bias for end in trace.sum_range)
    b = trace.shown.of_channels(trace.bias)
    return ExplainedStep(
        "bias",
        f"a + q_b, q_b = round(b / ({_unit(trace)})) = {b:.0f}",
        f"int{ACCUMULATOR_BITS}",
        ACCUMULATOR_BITS,
        _at_output(trace, trace.acc),
        _sqnr_db(trace.float_outputs, trace.real),
        f"{signed_width(low.min(), high.max())} bits needed for any input; the real value is "
        f"{trace.shown.of_outputs(trace.real):.6g}",
    )


def _float_output(trace: LayerTrace) -> ExplainedStep | None:
    if trace.outputs is not None:
        return None
    return ExplainedStep(
        "de-quantization",
        "nothing to do" if trace.acc is None else f"y = {_unit(trace)}·a",
        "float32",
        FLOAT_BITS,
        _at_output(trace, trace.real),
        _sqnr_db(trace.float_outputs, trace.real),
    )


def _requantization(trace: LayerTrace) -> ExplainedStep | None:
    if trace.requantized is None:
        return None
    multiplier, mantissa, shift = map(trace.shown.of_channels, trace.requantized[:3])
    is_shift = math.frexp(multiplier)[0] == 0.5
    return ExplainedStep(
        "requantization",
        f"round(M·a), M = {_unit(trace)} / s_y = {multiplier:.8g}",
        "int32",
        ACCUMULATOR_BITS,
        _at_output(trace, trace.requantized.rounded),
        None,
        f"M = 2^{math.frexp(multiplier)[1] - 1}: a shift, and no product"
        if is_shift
        else f"M in float32 = M0 / 2^shift = {mantissa:.0f} / "
        f"2^{shift:.0f}: a product with a 31-bit integer and a shift",
    )


def _output_codes(trace: LayerTrace) -> ExplainedStep | None:
    outputs, rounded = trace.layer.outputs, trace.outputs
    if outputs is None or rounded is None:
        return None
    scale, zero_point = map(trace.shown.of_channels, (rounded.scale, rounded.zero_point))
    sqnr_db, compared = _activated_sqnr_db(trace, trace.activated), ""
    if sqnr_db is None:
        sqnr_db = _sqnr_db(trace.float_outputs, rounded.real)
    elif trace.has_activation:
        compared = "; compared with the float network after the activation"
    own = "not compared with the network's own codes, which are rounded again or moved"
    if trace.agreement is not None:
        own = f"equal to the network's own code in {trace.agreement:.2%} of the outputs"
    return ExplainedStep(
        "zero point and clamp",
        f"q_y = clip(round(M·a) + {zero_point:.0f}, {_limits(outputs)}), s_y = {scale:.6g}",
        _type(outputs),
        outputs.bits,
        _at_output(trace, rounded.codes),
        sqnr_db,
        f"{_clipping(rounded.unclipped, outputs)}{compared}\n{own}{_q_formats(outputs)}",
    )


def _clipping_activation(trace: LayerTrace) -> ExplainedStep | None:
    if not trace.site.activation.is_clip or trace.activated is None or not trace.has_activation:
        return None
    outputs = trace.layer.outputs
    is_free = outputs is not None and float(outputs.range[0].min()) >= 0
    return ExplainedStep(
        f"activation: {trace.activation}",
        "nothing to do: the clamp at code 0 was the ReLU" if is_free else "y = act(y)",
        "float32" if outputs is None else "codes",
        FLOAT_BITS,
        _at_output(trace, trace.activated),
        _activated_sqnr_db(trace, trace.activated),
    )


def _other_activation(trace: LayerTrace) -> ExplainedStep | None:
    if trace.site.activation.is_clip:
        return None
    rounded, shown = trace.layer.activated, trace.activated
    shown = trace.network_activated if shown is None else shown
    return ExplainedStep(
        f"activation: {trace.activation}",
        "y = act(y), on real values",
        "float32",
        FLOAT_BITS,
        () if shown is None else _at_output(trace, shown),
        _activated_sqnr_db(trace, trace.activated),
        "" if rounded is None else f"then rounded to {rounded.bits} bits",
    )


def _activated_codes(trace: LayerTrace) -> ExplainedStep | None:
    activated, rounded = trace.layer.activated, trace.activated_outputs
    if activated is None or rounded is None:
        return None
    scale, zero_point = map(trace.shown.of_channels, (rounded.scale, rounded.zero_point))
    return ExplainedStep(
        "output codes after the activation",
        f"q_y = clip(round(y / {scale:.6g}) + {zero_point:.0f}, {_limits(activated)})",
        _type(activated),
        activated.bits,
        _at_output(trace, rounded.codes),
        _activated_sqnr_db(trace, rounded.real),
        _clipping(rounded.unclipped, activated) + _q_formats(activated),
    )


def _dequantization(trace: LayerTrace) -> ExplainedStep | None:
    last = trace.outputs if trace.activated_outputs is None else trace.activated_outputs
    is_before = trace.activated_outputs is None and not trace.site.activation.is_clip
    if last is None or trace.activated is None or is_before:
        return None
    real = trace.activated if trace.activated_outputs is None else trace.activated_outputs.real
    scale, zero_point = map(trace.shown.of_channels, (last.scale, last.zero_point))
    return ExplainedStep(
        "de-quantization",
        f"y = {scale:.6g}·(q_y − {zero_point:.0f})",
        "float32",
        FLOAT_BITS,
        _at_output(trace, real),
        _activated_sqnr_db(trace, real),
        "only where something other than a layer reads y (a residual sum, pooling, the "
        "output)\na layer that reads the codes folds s_y into its own multiplier",
    )


STEPS: tuple[Callable[[LayerTrace], ExplainedStep | None], ...] = (
    _input,
    _input_codes,
    _kernel,
    _kernel_codes,
    _float_sum,
    _products,
    _accumulator,
    _bias,
    _float_output,
    _requantization,
    _output_codes,
    _clipping_activation,
    _other_activation,
    _activated_codes,
    _dequantization,
)


# ---- Products of two activations


def _first_operand(trace: LayerTrace) -> ExplainedStep | None:
    return dataclasses.replace(_input(trace), name="first operand")


def _first_codes(trace: LayerTrace) -> ExplainedStep | None:
    step = _input_codes(trace)
    equation = step and step.equation.replace("q_x", "q_a").replace("x /", "a /")
    return step and dataclasses.replace(step, name="codes of the first operand", equation=equation)


def _second_operand(trace: LayerTrace) -> ExplainedStep:
    return ExplainedStep(
        "second operand",
        "b, as the layers before leave it" if not trace.is_float_network else "b, in float",
        "float32",
        FLOAT_BITS,
        trace.shown.of_kernel(trace.float_kernel),
        None,
    )


def _second_codes(trace: LayerTrace) -> ExplainedStep | None:
    grid = trace.layer.weights
    scale, zero_point = (float(np.asarray(leaf).item()) for leaf in (grid.scale, grid.zero_point))
    return ExplainedStep(
        "codes of the second operand",
        f"q_b = clip(round(b / {scale:.6g}) + {zero_point:.0f}, {_limits(grid)})",
        _type(grid),
        grid.bits,
        trace.shown.of_kernel(np.asarray(trace.layer.kernel, np.float64)),
        _sqnr_db(trace.float_kernel, trace.kernel_hat) if trace.is_float_network else None,
        _q_formats(grid).strip(),
    )


def _products_of_two(trace: LayerTrace) -> ExplainedStep | None:
    step = _products(trace)
    return step and dataclasses.replace(step, equation="p = (q_a − z_a)(q_b − z_b)")


MATMUL_STEPS: tuple[Callable[[LayerTrace], ExplainedStep | None], ...] = (
    _first_operand,
    _first_codes,
    _second_operand,
    _second_codes,
    _products_of_two,
    _accumulator,
    _float_output,
    _requantization,
    _output_codes,
    _dequantization,
)


# ---- Numbers and words


def _at_output(trace: LayerTrace, outputs: np.ndarray) -> tuple[float, ...]:
    return (trace.shown.of_outputs(outputs),)


def _unit(trace: LayerTrace) -> str:
    """What one unit of the accumulator is."""
    if trace.is_matmul:
        return "s_a·s_b"
    return "s_w" if trace.layer.folds_input_scales else "s_w·s_x"


def _sqnr_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    signal, noise = np.sum(reference**2), np.sum((reference - approximation) ** 2)
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def _activated_sqnr_db(trace: LayerTrace, activated: np.ndarray | None) -> float | None:
    """After the activation; None where the reference does not know that."""
    if trace.float_activated is None or activated is None:
        return None
    return _sqnr_db(trace.float_activated, activated)


def _clipping(codes: np.ndarray, qparams: QParams) -> str:
    low = np.mean(np.rint(codes) < int(qparams.qmin))
    high = np.mean(np.rint(codes) > int(qparams.qmax))
    return f"clipped {low:.2%} below and {high:.2%} above"


def _q_formats(qparams: QParams) -> str:
    """A line with the Q-formats of a tensor in fixed point; nothing for any other."""
    formats = q_formats(qparams)
    return f"\nfixed point: {', '.join(map(str, formats))}" if formats else ""


def _limits(qparams: QParams) -> str:
    return f"{int(qparams.qmin)}, {int(qparams.qmax)}"


def _type(format: Format) -> str:
    if isinstance(format, Multiples):
        return f"{np.dtype(format.dtype)} of {format.bits} bits"
    return f"{'int' if int(format.lowest) < 0 else 'uint'}{format.bits}"


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _number(value: float) -> str:
    value += 0.0  # -0 is shown as 0
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"
