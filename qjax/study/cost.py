"""What one inference costs: operations, bytes and energy of every layer, from a report.

A layer of N multiply-accumulates takes N multiplications of a b_w-bit by a b_x-bit number and N
additions to an accumulator of b_acc bits that starts at the bias. Numbers in float count 32 bits.

References:
  Horowitz, 2014, Computing's energy problem (and what we can do about it), ISSCC, figure 1.1.9.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, overload

from qjax.quantize import Quantized
from qjax.report import LayerReport, MatmulReport, Report, si
from qjax.table import shortened, table

ACCUMULATOR_BITS = 32


class EnergyModel(NamedTuple):
    """The energy of operations by their width.

    Attributes:
      unit: of energy.
      multiply: of (bits of one operand, bits of the other, whether in float).
      add: of (bits of the accumulator, whether in float).
      move: of one bit between memory and the arithmetic.
    """

    unit: str
    multiply: Callable[[int, int, bool], float]
    add: Callable[[int, bool], float]
    move: float


def _multiply_45nm(b_w: int, b_x: int, in_float: bool) -> float:
    return 3.7 if in_float else 0.2 * (b_w * b_x / 64) ** (math.log(3.1 / 0.2) / math.log(16))


def _add_45nm(bits: int, in_float: bool) -> float:
    return 0.9 if in_float else 0.03 + (0.1 - 0.03) * (bits - 8) / (32 - 8)


MODELS: Mapping[str, EnergyModel] = {
    "bits": EnergyModel("bit operations", lambda b_w, b_x, _: b_w * b_x, lambda b, _: b, 0.0),
    "picojoules": EnergyModel("pJ", _multiply_45nm, _add_45nm, 100 / 64),
}


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer takes for one example.

    Attributes:
      name: of the layer.
      macs: multiply-accumulate operations.
      multiplications: among them.
      additions: among them.
      weight_bytes: of the kernel's codes at their true width, scales, zero points and bias.
      activation_bytes: of its input and output at their true width.
      bit_operations: macs · b_w · b_x, both 32 where one of them is in float.
      energy: in the model's unit.
    """

    name: str
    macs: int
    multiplications: int
    additions: int
    weight_bytes: int
    activation_bytes: int
    bit_operations: int
    energy: float


class Cost(Sequence[LayerCost]):
    """A record per layer, then one per quantized product of two activations, as a table in text.

    `str(cost)` is at most 100 columns wide.

    Attributes:
      unit: of energy.
      total: the sum over all layers.
    """

    def __init__(self, layers: Sequence[LayerCost], unit: str) -> None:
        self._layers = tuple(layers)
        self.unit: str = unit
        names = [field.name for field in dataclasses.fields(LayerCost)][1:]
        sums = {name: sum(getattr(layer, name) for layer in layers) for name in names}
        self.total: LayerCost = LayerCost(f"{len(layers)} layers", **sums)

    @overload
    def __getitem__(self, index: int) -> LayerCost: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerCost]: ...
    def __getitem__(self, index: int | slice) -> LayerCost | Sequence[LayerCost]:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        header = ("cost of one example", "MACs", "mul", "add", "weight B", "act. B", "bit ops")
        rows = []
        for layer in (*self, self.total):
            name, *numbers = dataclasses.astuple(layer)
            rows.append((shortened(name, 30), *map(si, numbers)))
        *rows, total = rows
        return table((*header, f"energy ({self.unit})"), rows, "<>>>>>>>", footer=total)


def cost(
    q: Quantized | Sequence[LayerReport],
    *,
    model: str | EnergyModel = "bits",
    accumulator_bits: int | Mapping[str, int] = ACCUMULATOR_BITS,
) -> Cost:
    """Counts what every layer takes for one example.

    Args:
      q: a quantized network, or its report.
      model: of energy. `bits`: E = N_mul·(b_w·b_x) + N_add·b_acc. `picojoules`: 45 nm figures; an
        integer addition of 8 (32) bits takes 0.03 (0.1) pJ, linear in the width between; an integer
        multiplication of 8 by 8 (32 by 32) bits 0.2 (3.1) pJ, a power of b_w·b_x between; 0.9 and
        3.7 pJ in float32; and every weight, input and output moves once between the arithmetic and
        a cache of 1 MB, 100 pJ per 64 bits. Or an `EnergyModel` of your own.
      accumulator_bits: width of the integer accumulators, of all layers or by layer name.

    Returns:
      A `Cost`.

    Raises:
      ValueError: an unknown model, or an accumulator width for a layer that there is not.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> params, images = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4))
      >>> recipe = qjax.recipe(8, weight_bits=4).naive()
      >>> q = qjax.quantize(lambda params, x: x @ params["w"], params, images, recipe)
      >>> cost(q).total.bit_operations  # 12 products of 4 by 8 bits
      384
    """
    report = q.report if isinstance(q, Quantized) else q
    matmuls = report.matmuls if isinstance(report, Report) else ()
    if isinstance(model, str):
        if model not in MODELS:
            raise ValueError(f"`model` must be one of {', '.join(MODELS)}; got {model!r}.")
        model = MODELS[model]
    widths = dict.fromkeys((record.name for record in (*report, *matmuls)), ACCUMULATOR_BITS)
    if isinstance(accumulator_bits, int):
        widths = dict.fromkeys(widths, accumulator_bits)
    elif unknown := set(accumulator_bits) - set(widths):
        raise ValueError(
            f"`accumulator_bits` names {', '.join(sorted(unknown))}; the layers are "
            f"{', '.join(widths)}."
        )
    else:
        widths |= accumulator_bits
    layers = [_layer_cost(record, model, widths[record.name]) for record in report]
    products = [_matmul_cost(record, model, widths[record.name]) for record in matmuls]
    return Cost([*layers, *products], model.unit)


def _layer_cost(record: LayerReport, model: EnergyModel, b_acc: int) -> LayerCost:
    in_float = record.weight_bits is None or record.input_bits is None
    b_w, b_x = record.weight_bits or 32, record.input_bits or 32
    operands = (32, 32) if in_float else (b_w, b_x)
    moved = math.prod(record.input_shape) * b_x
    moved += math.prod(record.output_shape) * (record.output_bits or 32)
    kernel = math.prod(record.kernel_shape) * b_w
    return _cost(record, model, operands, None if in_float else b_acc, moved, kernel)


def _matmul_cost(record: MatmulReport, model: EnergyModel, b_acc: int) -> LayerCost:
    lhs, rhs, result = (bits or 32 for bits in record.bits)
    sizes = map(math.prod, record.shapes)
    moved = sum(size * bits for size, bits in zip(sizes, (lhs, rhs, result), strict=True))
    return _cost(record, model, (lhs, rhs), b_acc, moved)


def _cost(
    record: LayerReport | MatmulReport,
    model: EnergyModel,
    operands: tuple[int, int],
    b_acc: int | None,
    moved: int,
    kernel: int = 0,
) -> LayerCost:
    """The cost of a sum of products.

    Args:
      record: what computes it.
      model: of energy.
      operands: the bits of what is multiplied.
      b_acc: bits of the accumulator; None for a sum in float.
      moved: bits of the activations that are read and written.
      kernel: bits of the weights.
    """
    in_float = b_acc is None
    energy = record.macs * (
        model.multiply(*operands, in_float) + model.add(32 if b_acc is None else b_acc, in_float)
    )
    return LayerCost(
        name=record.name,
        macs=record.macs,
        multiplications=record.macs,
        additions=record.macs,
        weight_bytes=record.bytes_quantized,
        activation_bytes=math.ceil(moved / 8),
        bit_operations=record.macs * operands[0] * operands[1],
        energy=energy + model.move * (kernel + moved),
    )
