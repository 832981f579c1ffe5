"""Everything that one layer computes on an input, in 64-bit floats, and what it is compared with.

The arithmetic is that of Jacob et al., 2018, arXiv:1712.05877, section 2:
acc = Σ (q_w − z_w)(q_x − z_x) + q_b, then q_y = clip(round(M·acc) + z_y) with M = s_w·s_x / s_y in
fixed point, M = m / 2^n (`qjax.integer.requantize`). Sums of codes are exact: float64 holds the
integers up to 2^53.

In the shapes, P counts output positions over examples and space, G groups, K the elements of a
patch and M the output channels of a group (`qjax.graph.operation`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams, quantize_array
from qjax.formats.binary import Signs
from qjax.formats.dynamic import ActivationFormat, Dynamic
from qjax.graph import elementwise, jaxpr
from qjax.graph.activation import NONE, Activation
from qjax.graph.layers import Layer, Movement, Site, find_layers, shapes_of
from qjax.graph.matmuls import KIND as MATMUL
from qjax.graph.matmuls import Matmul, find_matmuls
from qjax.graph.operation import DotProduct, Linear, by_channel, output_matrix
from qjax.integer.requantize import SHIFT, fixed_point, multiply_shift
from qjax.programs import program
from qjax.quantize import Quantized
from qjax.run.layer import (
    QuantizedLayer,
    accumulator_scale,
    at_input,
    dequantized_bias,
    dequantized_kernel,
    fold_input_scales,
    relative_codes,
    scaled_kernel,
)
from qjax.run.matmul import QuantizedMatmul
from qjax.run.signs import center
from qjax.run.tap import MatmulTap, Tap, float_layers, tapped

SHOWN = 8  # elements of a patch that are written out


class Reference(NamedTuple):
    """What a layer is compared with: the same operation, unrounded.

    Attributes:
      input: float[...], the input it reads.
      kernel: float[G, K, M].
      bias: float[G * M], in real units.
      is_float_network: whether these are of the float network; otherwise the input is that of the
        quantized layer, and kernel and bias are what its codes stand for.
    """

    input: Any
    kernel: Any
    bias: Any
    is_float_network: bool


class Shown(NamedTuple):
    """Which of a layer's many values are written out.

    Attributes:
      position: the output position.
      group: the group of the output channel.
      column: the output channel, counted within its group.
      elements: int[shown], elements of the patch in ascending order.
    """

    position: int
    group: int
    column: int
    elements: np.ndarray

    def of_patches(self, patches: np.ndarray) -> tuple[float, ...]:
        """The elements of float[P, G, K]."""
        return tuple(map(float, patches[self.position, self.group, self.elements]))

    def of_kernel(self, kernel: np.ndarray) -> tuple[float, ...]:
        """The elements of float[G, K, M]."""
        return tuple(map(float, kernel[self.group, self.elements, self.column]))

    def of_outputs(self, outputs: np.ndarray) -> float:
        """The one of float[P, G, M]."""
        return float(outputs[self.position, self.group, self.column])

    def of_channels(self, values: np.ndarray) -> float:
        """The one of float[G, M]."""
        return float(values[self.group, self.column])


class Requantized(NamedTuple):
    """An integer accumulator on the grid of the output, before the zero point.

    Attributes:
      multiplier: [G, M], M = s_w·s_x / s_y.
      mantissa: [G, M], m of M = m / 2^n in float32.
      shift: [G, M], n.
      rounded: [P, G, M], round(M·acc).
    """

    multiplier: np.ndarray
    mantissa: np.ndarray
    shift: np.ndarray
    rounded: np.ndarray


class Rounded(NamedTuple):
    """Outputs as codes.

    Attributes:
      scale: [G, M], real units per code.
      zero_point: [G, M], the code of real 0.
      unclipped: [P, G, M], codes before the clamp.
      codes: [P, G, M].
      real: [P, G, M], what the codes stand for.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    unclipped: np.ndarray
    codes: np.ndarray
    real: np.ndarray


@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """Every intermediate result of a layer on an input, in the order they are computed.

    Arrays are float64. `float_` marks what the reference computes.

    Attributes:
      site: the layer and where it stands.
      layer: its parameters, ranges that are found at run time being those of this input.
      is_dynamic: whether the range of its input is.
      is_float_network: whether the reference is the float network.
      activation: the name of the activation.
      activation_range: what the activation clips its argument to; None where it does not clip.
      shown: which values are written out.
      float_patches: [P, G, K].
      float_kernel: [G, K, M].
      float_sums: [P, G, M], before the bias.
      float_outputs: [P, G, M], before the activation.
      float_activated: [P, G, M], after it; None where its form is unknown.
      patches: [P, G, K], the input as the layers before leave it.
      input_scale: [G or 1, K or 1], real units per input code; None for an input in float.
      patches_q: [P, G, K], input codes less the zero point; real for an input in float, and for
        signs, which have a magnitude per position.
      kernel_q: [G, K, M], kernel codes less zero points; real for a kernel in float or per group.
      kernel_hat: [G, K, M], the kernel in real units.
      products: [shown], patches_q · kernel_q of the shown elements.
      input_range: the least and the greatest of all possible `patches_q`; None for an input in
        float.
      sum_range: each [G, M], the least and the greatest sum that they make; None for an
        input in float.
      sums: [P, G, M], of the products.
      bias: [G, M], codes at the accumulator's scale; real where the accumulator is in float.
      unit: [G, M], the real value of one unit of the sums.
      acc: [P, G, M], sums and bias; None where the accumulator is in float.
      real: [P, G, M], sums and bias in real units.
      requantized: the accumulator on the grid of the output; None if either is in float.
      outputs: rounded before the activation, or None.
      agreement: share of those codes that are the network's own; None where they cannot be
        compared, being moved or rounded again.
      network_activated: [P, G, M], after the activation as the network has it; None where its
        elements are moved.
      activated: [P, G, M], after the activation; None where its form is unknown.
      activated_outputs: rounded after the activation, or None.
    """

    site: Site
    layer: QuantizedLayer
    is_dynamic: bool
    is_float_network: bool
    activation: str
    activation_range: tuple[float, float] | None
    shown: Shown
    float_patches: np.ndarray
    float_kernel: np.ndarray
    float_sums: np.ndarray
    float_outputs: np.ndarray
    float_activated: np.ndarray | None
    patches: np.ndarray
    input_scale: np.ndarray | None
    patches_q: np.ndarray
    kernel_q: np.ndarray
    kernel_hat: np.ndarray
    products: np.ndarray
    input_range: tuple[float, float] | None
    sum_range: tuple[np.ndarray, np.ndarray] | None
    sums: np.ndarray
    bias: np.ndarray
    unit: np.ndarray
    acc: np.ndarray | None
    real: np.ndarray
    requantized: Requantized | None
    outputs: Rounded | None
    agreement: float | None
    network_activated: np.ndarray | None
    activated: np.ndarray | None
    activated_outputs: Rounded | None

    @property
    def is_matmul(self) -> bool:
        """Whether it is a product of two activations, its kernel being the second operand."""
        return self.site.layer.kind == MATMUL

    @property
    def has_activation(self) -> bool:
        """Whether anything is done to the output."""
        return self.activation_range != (-math.inf, math.inf)


def measure_layer(q: Quantized, layer: str, x: Any, params: Any = None) -> LayerTrace:
    """Runs a network and follows one of its layers; the arguments are those of `qjax.explain`."""
    function = q.apply_fn
    network = find_layers(function.apply_fn, function.params, shapes_of(x))
    sites = {site.layer.name: site for site in network.first_sites}
    products: Mapping[str, QuantizedMatmul] = q.params.get("matmuls", {})
    if layer in products:
        floats = None if params is None else float_layers(network, params)
        [matmul] = (found for found in find_matmuls(network) if found.name == layer)
        run = tapped(function.apply_fn, function.params, x, [layer])
        actual = run(q.params, x)[1][layer]
        given = actual if floats is None else run(floats, x)[1][layer]
        return _trace_matmul(matmul, products[layer], actual, given, floats is not None)
    if layer not in sites:
        raise ValueError(f"`layer` must be one of {', '.join([*sites, *products])}; got {layer!r}.")
    run = tapped(function.apply_fn, function.params, x, [layer])
    site, quantized = sites[layer], q.params["layers"][layer]
    actual = run(q.params, x)[1][layer]
    if params is None:
        kernel, bias = _dequantized(site.layer.operation, quantized)
        return trace_layer(site, quantized, actual, Reference(actual.input, kernel, bias, False))
    floats = float_layers(network, params)
    own = floats["layers"][layer]
    given = run(floats, x)[1][layer]
    return trace_layer(site, quantized, actual, Reference(given.input, own.kernel, own.bias, True))


def _trace_matmul(
    matmul: Matmul,
    grids: QuantizedMatmul,
    actual: MatmulTap,
    given: MatmulTap,
    is_float_network: bool,
) -> LayerTrace:
    """Follows a product of two activations as a layer whose kernel is the second operand.

    Args:
      matmul: the product.
      grids: of it.
      actual: what it reads and writes in the quantized network.
      given: the reference: what it does in the float network, or in the quantized one.
      is_float_network: which of the two.
    """
    product, dtype = matmul.product, jaxpr.dtype(matmul.output)
    operation = DotProduct(False, product.contracting, product.batch, actual.rhs.shape)
    groups, _, channels = operation.matrix_shape
    shapes = actual.rhs.shape, actual.lhs.shape, actual.output.shape
    described = Layer(matmul.name, MATMUL, NONE.name, *shapes, matmul.macs, operation)
    lhs, rhs = matmul.operands
    site = Site(
        layer=described,
        input=lhs,
        kernel=rhs,
        chain=(matmul.position,),
        operations=(),
        movement=Movement((), dtype),
        output=matmul.output,
        activation=NONE,
        activated=matmul.output,
        activating=(),
        shortcut=None,
    )
    scale, zero_point = (leaf.reshape(1, 1, 1) for leaf in (grids.rhs.scale, grids.rhs.zero_point))
    layer = QuantizedLayer(
        kernel=operation.to_matrix(grids.rhs.encode(actual.rhs)),
        bias=jnp.zeros(groups * channels, jnp.int32),
        weights=dataclasses.replace(grids.rhs, scale=scale, zero_point=zero_point),
        inputs=grids.lhs,
        outputs=grids.outputs,
        activated=None,
    )
    kernel = operation.to_matrix(given.rhs.astype(jnp.float32))
    reference = Reference(given.lhs, kernel, jnp.zeros(groups * channels), is_float_network)
    return trace_layer(site, layer, Tap(actual.lhs, actual.output, actual.output), reference)


def trace_layer(site: Site, layer: QuantizedLayer, actual: Tap, reference: Reference) -> LayerTrace:
    """Does a layer's arithmetic in 64 bits and keeps every result.

    Shown is the greatest output of the reference, and of its patch the `SHOWN` elements with the
    largest products.

    Args:
      site: the layer and where it stands.
      layer: its parameters.
      actual: what it reads and writes in the quantized network.
      reference: what it is compared with.

    Returns:
      A `LayerTrace`.
    """
    operation = site.layer.operation
    is_dynamic = isinstance(layer.inputs, Dynamic)
    _check_examples(site, layer, actual.input)
    activation, activation_range = _activation(site)
    read = _operands(operation, layer, actual.input, reference.input)
    layer = read.layer

    float_patches = np.asarray(read.float_patches, np.float64)
    float_kernel = np.asarray(reference.kernel, np.float64)
    float_sums = _sum_products(float_patches, float_kernel)
    float_outputs = float_sums + _by_output_channel(operation, reference.bias)
    float_activated = _activated(site.activation, float_outputs)

    patches_q = np.asarray(read.patches_q, np.float64)
    if isinstance(layer.inputs, Signs):
        signs = np.where(patches_q >= 0, 1.0, -1.0)
        patches_q = signs * np.abs(patches_q).mean(-1, keepdims=True)
    kernel_q = np.asarray(read.kernel_q, np.float64)
    greatest = float_outputs if float_activated is None else float_activated
    position, group, column = map(int, np.unravel_index(greatest.argmax(), greatest.shape))
    products = patches_q[position, group] * kernel_q[group, :, column]
    elements = np.sort(np.argsort(-np.abs(products), kind="stable")[:SHOWN])

    sums = _sum_products(patches_q, kernel_q)
    bias = _by_output_channel(operation, layer.bias)
    unit = _by_output_channel(operation, read.unit)
    acc = sums + bias if layer.has_integer_accumulator else None
    real = sums * unit + bias if acc is None else acc * unit
    input_range = None if layer.grid is None else _relative_range(layer.grid)

    requantized, outputs, result = None, None, real
    layer = dataclasses.replace(layer, outputs=_found(layer.outputs, real))
    if layer.outputs is not None:
        if acc is not None:
            requantized = _requantize(acc, unit, _grid(operation, layer.outputs)[0])
        outputs = _round_outputs(operation, layer.outputs, real, requantized)
        result = outputs.real
    activated, activated_outputs = _activated(site.activation, result), None
    if layer.activated is not None and activated is not None:
        layer = dataclasses.replace(layer, activated=_found(layer.activated, activated))
        activated_outputs = _round_activated(operation, layer.activated, activated)
    return LayerTrace(
        site=site,
        layer=layer,
        is_dynamic=is_dynamic,
        is_float_network=reference.is_float_network,
        activation=activation,
        activation_range=activation_range,
        shown=Shown(position, group, column, elements),
        float_patches=float_patches,
        float_kernel=float_kernel,
        float_sums=float_sums,
        float_outputs=float_outputs,
        float_activated=float_activated,
        patches=np.asarray(read.patches, np.float64),
        input_scale=None if layer.grid is None else np.asarray(read.input_scale, np.float64),
        patches_q=patches_q,
        kernel_q=kernel_q,
        kernel_hat=np.asarray(read.kernel_hat, np.float64),
        products=products[elements],
        input_range=input_range,
        sum_range=None if input_range is None else _sum_range(kernel_q, input_range),
        sums=sums,
        bias=bias,
        unit=unit,
        acc=acc,
        real=real,
        requantized=requantized,
        outputs=outputs,
        agreement=None if outputs is None else _agreement(site, layer, actual, outputs.codes),
        network_activated=None if site.movement else _matrix(operation, actual.activated),
        activated=activated,
        activated_outputs=activated_outputs,
    )


# ---- Ranges that are found at run time


def _check_examples(site: Site, layer: QuantizedLayer, x: jax.Array) -> None:
    axes = [f.axis for f in (layer.inputs, layer.outputs) if isinstance(f, Dynamic)]
    examples = max((x.shape[axis] for axis in axes if axis is not None), default=1)
    if examples > 1:
        raise ValueError(
            f"`x` must hold one example, since every example has ranges of its own in layer "
            f"{site.layer.name!r}; got {examples}."
        )


def _found(format: ActivationFormat | None, values: np.ndarray) -> QParams | None:
    """The grid of all of these values."""
    if isinstance(format, Dynamic):
        return dataclasses.replace(format, axis=None).at(jnp.asarray(values, jnp.float32))
    return format


# ---- Activation


def _activation(site: Site) -> tuple[str, tuple[float, float] | None]:
    """The name of a layer's activation, and what it clips to where clipping is all it does."""
    activation = site.activation
    return activation.name, activation.bounds if activation.is_clip else None


def _activated(activation: Activation, z: np.ndarray) -> np.ndarray | None:
    return elementwise.evaluate(activation.function, z) if activation.is_pointwise else None


# ---- Operands


class _Operands(NamedTuple):
    """What a layer multiplies, as arrays of JAX; see `LayerTrace`.

    Attributes:
      layer: its parameters, the range of its input found.
      patches_q: centered values in real units where the input is read as signs.
    """

    layer: QuantizedLayer
    float_patches: jax.Array
    patches: jax.Array
    input_scale: jax.Array | None
    patches_q: jax.Array
    kernel_q: jax.Array
    kernel_hat: jax.Array
    unit: jax.Array


@program(static_argnums=0)
def _operands(
    operation: Linear, layer: QuantizedLayer, x: jax.Array, x_reference: jax.Array
) -> _Operands:
    layer = at_input(operation, layer, x)
    return _Operands(
        layer=layer,
        float_patches=_patches(operation, x_reference),
        patches=_patches(operation, x),
        input_scale=None if layer.grid is None else _input_scale(operation, layer.grid),
        patches_q=_input_codes(operation, layer, x),
        kernel_q=scaled_kernel(layer) if layer.is_per_group else relative_codes(layer),
        kernel_hat=dequantized_kernel(operation, layer),
        unit=accumulator_scale(operation, layer),
    )


@program(static_argnums=0)
def _dequantized(operation: Linear, layer: QuantizedLayer) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias in real units."""
    return dequantized_kernel(operation, layer), dequantized_bias(operation, layer)


def _patches(operation: Linear, x: jax.Array) -> jax.Array:
    return operation.patches(x.astype(jnp.float32))


def _input_codes(operation: Linear, layer: QuantizedLayer, x: jax.Array) -> jax.Array:
    """The patches in codes less the zero point; real values where those are not on one grid."""
    if isinstance(layer.inputs, Signs):
        return _patches(*center(operation, layer.inputs, x))
    if layer.grid is None:
        return _patches(operation, x)
    codes = quantize_array(x, layer.grid).astype(jnp.int32) - layer.grid.zero_point
    return _patches(operation, codes)


def _input_scale(operation: Linear, inputs: QParams) -> jax.Array:
    """The scale of every element of a patch, [G or 1, K or 1]."""
    if not inputs.scale.ndim:
        return inputs.scale.reshape(1, 1)
    ones = jnp.ones((*operation.matrix_shape[:2], 1))
    return fold_input_scales(operation, inputs, ones)[:, :, 0]


def _relative_range(qparams: QParams) -> tuple[float, float]:
    """The least and the greatest code less the zero point."""
    zero_point = int(qparams.zero_point)
    return float(int(qparams.qmin) - zero_point), float(int(qparams.qmax) - zero_point)


# ---- Sums


def _sum_products(patches: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Σ_k x[p, g, k]·w[g, k, m], exact for integers below 2^53."""
    return np.einsum("pgk,gkm->pgm", patches, kernel, optimize=True)


def _sum_range(
    kernel: np.ndarray, input_range: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest sum of products, each [G, M], for inputs in a range."""
    at_low, at_high = (kernel * end for end in input_range)
    return np.minimum(at_low, at_high).sum(1), np.maximum(at_low, at_high).sum(1)


def _by_output_channel(operation: Linear, vector: Any) -> np.ndarray:
    """Reorders [G * M] to float64[G, M]."""
    groups, _, channels = operation.matrix_shape
    return np.asarray(vector, np.float64).reshape(groups, channels)


# ---- Outputs


def _requantize(acc: np.ndarray, unit: np.ndarray, scale: np.ndarray) -> Requantized:
    multiplier = unit / scale
    in_fixed_point = bool(np.all(np.frexp(multiplier)[0] == 0.5))
    arrays = jnp.asarray(acc, jnp.int32), jnp.asarray(multiplier[None], jnp.float32)
    found = _multiplied(in_fixed_point, *arrays)
    mantissa, shift, rounded = (np.asarray(part, np.float64) for part in found)
    return Requantized(multiplier, mantissa[0], shift[0], rounded)


@program(static_argnums=0)
def _multiplied(
    in_fixed_point: bool, acc: jax.Array, multiplier: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m, n, round(M·acc)), M = m / 2^n."""
    mantissa, shift = fixed_point(multiplier)
    if in_fixed_point:
        return mantissa, shift, SHIFT.requantize(acc, multiplier)
    return mantissa, shift, multiply_shift(acc, mantissa, shift, rounds=True)


def _round_outputs(
    operation: Linear, qparams: QParams, real: np.ndarray, requantized: Requantized | None
) -> Rounded:
    scale, zero_point = _grid(operation, qparams)
    rounded = np.rint(real / scale) if requantized is None else requantized.rounded
    unclipped = rounded + zero_point
    codes = np.clip(unclipped, int(qparams.qmin), int(qparams.qmax))
    return Rounded(scale, zero_point, unclipped, codes, (codes - zero_point) * scale)


def _round_activated(operation: Linear, qparams: QParams, real: np.ndarray) -> Rounded:
    scale, zero_point = _grid(operation, qparams)
    codes = np.asarray(quantize_array(jnp.asarray(real, jnp.float32), qparams), np.float64)
    return Rounded(
        scale, zero_point, real / scale + zero_point, codes, (codes - zero_point) * scale
    )


def _grid(operation: Linear, qparams: QParams) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of an output, each float64[G, M]."""
    own = _like_output_matrix(operation, qparams)
    groups, _, channels = operation.matrix_shape
    scale, zero_point = (
        np.broadcast_to(np.asarray(leaf, np.float64), (1, groups, channels))[0]
        for leaf in (own.scale, own.zero_point)
    )
    return scale, zero_point


def _like_output_matrix(operation: Linear, qparams: QParams) -> QParams:
    """Qparams of an output for its [P, G, M]: scalars, or [1, G, M]."""
    if not qparams.scale.ndim:
        return qparams
    groups, _, channels = operation.matrix_shape
    scale, zero_point = (
        by_channel(operation.channel_axes, leaf).reshape(1, groups, channels)
        for leaf in (qparams.scale, qparams.zero_point)
    )
    return dataclasses.replace(qparams, scale=scale, zero_point=zero_point)


_output_matrix = program(static_argnums=0)(output_matrix)


def _matrix(operation: Linear, output: jax.Array) -> np.ndarray:
    return np.asarray(_output_matrix(operation, output), np.float64)


def _agreement(site: Site, layer: QuantizedLayer, actual: Tap, codes: np.ndarray) -> float | None:
    """The share of codes that are the network's own, None where those are not at hand."""
    is_rounded_again = site.output is site.activated and layer.activated is not None
    if site.movement or is_rounded_again or layer.outputs is None:
        return None
    operation = site.layer.operation
    own = _output_codes(operation, actual.output, layer.outputs)
    return float(np.mean(np.asarray(own) == codes))


@program(static_argnums=0)
def _output_codes(operation: Linear, output: jax.Array, qparams: QParams) -> jax.Array:
    matrix = output_matrix(operation, output).astype(jnp.float32)
    return quantize_array(matrix, _like_output_matrix(operation, qparams))
