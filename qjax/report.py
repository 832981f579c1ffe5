"""What quantization did to each layer, as records and as a table."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import Any, overload

import jax
import numpy as np

from qjax import charts
from qjax.fit.junction import FittedJunction, FittedMatmul
from qjax.fit.layer import Fit
from qjax.fit.table import FittedTable
from qjax.formats.affine import QParams
from qjax.formats.binary import Signs
from qjax.formats.dynamic import ActivationFormat
from qjax.graph import jaxpr
from qjax.graph.junctions import Junction
from qjax.graph.layers import Layer, Skipped
from qjax.graph.matmuls import KIND, Matmul
from qjax.graph.tables import KIND as TABLE
from qjax.graph.tables import Table
from qjax.recipe import Recipe
from qjax.table import printable, table


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
      name: where its kernel lives in params.
      kind: conv, depthwise_conv, grouped_conv, dense or grouped_dense.
      activation: what follows its output.
      kernel_shape: shape of the kernel as the operation sees it.
      output_shape: shape of its output for one example.
      weight_bits: width of the kernel's codes, None in float, as the next two.
      input_bits: of its input.
      output_bits: of its output.
      weight_scale: least and greatest scale of the kernel, None in float.
      input_scale: real units per code of the input, mean over channels; None in float or if its
        range is found at run time, as the next three.
      input_zero_point: the input's code of 0.
      output_scale: real units per code of the output, mean over channels.
      output_zero_point: the output's code of 0, None if it differs between channels too.
      weight_sqnr_db: signal to noise of the kernel.
      output_sqnr_db: signal to noise of the output after the activation, against the float
        network's, all earlier layers quantized too (or the layer alone, where the recipe is not
        sequential); None where it was quantized without images.
      weight_clip: the clipping range's share of the range of the values; None in float.
      input_clip: that of the input.
      output_clip: that of the output.
      macs: multiply-accumulate operations per example.
      bytes_float: of kernel and bias in float32.
      bytes_quantized: of codes at their true width, scales, zero points and bias.
      input_shape: shape of its input for one example.
    """

    name: str
    kind: str
    activation: str
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_bits: int | None
    input_bits: int | None
    output_bits: int | None
    weight_scale: tuple[float, float] | None
    input_scale: float | None
    input_zero_point: int | None
    output_scale: float | None
    output_zero_point: int | None
    weight_sqnr_db: float
    output_sqnr_db: float | None
    weight_clip: float | None
    input_clip: float | None
    output_clip: float | None
    macs: int
    bytes_float: int
    bytes_quantized: int
    input_shape: tuple[int, ...]

    @property
    def widths(self) -> str:
        """The bits of weights, input and output; d marks a range that is found at run time."""
        widths = (self.weight_bits, self.input_bits, self.output_bits)
        marks = ("", "d" * self.has_dynamic_input, "d" * self.has_dynamic_output)
        pairs = zip(widths, marks, strict=True)
        return "/".join("–" if bits is None else f"{bits}{mark}" for bits, mark in pairs)

    @property
    def has_dynamic_input(self) -> bool:
        """Whether the range of the input is found at run time."""
        found = self.input_scale, self.input_zero_point
        return self.input_bits is not None and found == (None, None)

    @property
    def has_dynamic_output(self) -> bool:
        """Whether the range of the output is found at run time."""
        return self.output_bits is not None and self.output_scale is None


@dataclasses.dataclass(frozen=True)
class SumReport:
    """One quantized value that no layer computes.

    Attributes:
      name: the last layer before it, and its kind.
      layer: that layer; empty if there is none.
      kind: sum, concat, pool, or branch (what goes into one of them).
      activation: what follows it: a name in `ACTIVATIONS`.
      shape: for one example.
      bits: width of its codes.
      scale: real units per code.
      zero_point: the code of 0.
      sqnr_db: signal to noise after the activation, against the float network's.
      clip: the clipping range's share of the range of its values.
    """

    name: str
    layer: str
    kind: str
    activation: str
    shape: tuple[int, ...]
    bits: int
    scale: float
    zero_point: int
    sqnr_db: float
    clip: float

    @property
    def bytes_quantized(self) -> int:
        """Of scale and zero point."""
        return 8


@dataclasses.dataclass(frozen=True)
class MatmulReport:
    """One quantized product of two activations.

    Attributes:
      name: the last layer before it, and its kind.
      layer: that layer; empty if there is none.
      kind: matmul.
      shapes: of its operands and its result, for one example.
      bits: widths of their codes; None for a result in float, as the next three.
      scales: real units per code.
      zero_points: the codes of 0.
      clips: the clipping ranges' shares of the ranges of the values.
      output_sqnr_db: signal to noise of the result, against the float network's.
      depth: how many products make up one element of the result.
      macs: multiply-accumulate operations per example.
    """

    name: str
    layer: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bits: tuple[int | None, ...]
    scales: tuple[float | None, ...]
    zero_points: tuple[int | None, ...]
    clips: tuple[float | None, ...]
    output_sqnr_db: float | None
    depth: int
    macs: int

    @property
    def bytes_quantized(self) -> int:
        """Of scales and zero points."""
        return 8 * sum(bits is not None for bits in self.bits)

    @property
    def widths(self) -> str:
        """The bits of both operands and of the result."""
        return "/".join("–" if bits is None else str(bits) for bits in self.bits)


@dataclasses.dataclass(frozen=True)
class TableReport:
    """One quantized table: a params leaf that the input picks from.

    Attributes:
      name: its path in params.
      kind: table.
      shape: of the leaf.
      bits: width of its codes.
      sqnr_db: signal to noise of its values.
      clip: the clipping ranges' shares of the ranges of the values, their mean.
      bytes_float: of the leaf.
      bytes_quantized: of codes at their width, and of scales and zero points.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    sqnr_db: float
    clip: float
    bytes_float: int
    bytes_quantized: int


def table_report(table: Table, fitted: FittedTable) -> TableReport:
    """Describes a fitted table.

    Raises:
      ValueError: its SQNR is no number: values left the range of float32.
    """
    quantized, ratio = fitted.quantized, float(fitted.sqnr_db)
    if math.isnan(ratio):
        raise ValueError(
            f"table {table.name!r} cannot be quantized: its SQNR is not a number, as values leave "
            "the range of float32. Rescale it."
        )
    weights = quantized.weights
    return TableReport(
        name=table.name,
        kind=TABLE,
        shape=jaxpr.shape(table.var),
        bits=weights.bits,
        sqnr_db=ratio,
        clip=float(fitted.clip),
        bytes_float=math.prod(jaxpr.shape(table.var)) * jaxpr.dtype(table.var).itemsize,
        bytes_quantized=math.ceil(quantized.codes.size * weights.bits / 8) + _table_bytes(weights),
    )


def matmul_report(matmul: Matmul, fitted: FittedMatmul) -> MatmulReport:
    """Describes a fitted product of two activations."""
    grids = [part.grid for part in fitted]
    return MatmulReport(
        name=matmul.name,
        layer=matmul.layer,
        kind=KIND,
        shapes=matmul.shapes,
        bits=tuple(grid and grid.bits for grid in grids),
        scales=tuple(_scale(grid) for grid in grids),
        zero_points=tuple(_zero_point(grid) for grid in grids),
        clips=tuple(None if part.grid is None else float(part.clip) for part in fitted),
        output_sqnr_db=fitted.outputs.sqnr_db,
        depth=matmul.depth,
        macs=matmul.macs,
    )


def sum_report(junction: Junction, fitted: FittedJunction) -> SumReport:
    """Describes a fitted junction."""
    grid = fitted.grid
    assert grid is not None
    return SumReport(
        name=junction.name,
        layer=junction.layer,
        kind=junction.kind,
        activation=junction.activation.name,
        shape=fitted.shape[1:],
        bits=grid.bits,
        scale=float(grid.scale),
        zero_point=int(grid.zero_point),
        sqnr_db=fitted.sqnr_db,
        clip=float(fitted.clip),
    )


def layer_report(layer: Layer, fit: Fit) -> LayerReport:
    """Describes a fitted layer.

    Raises:
      ValueError: an SQNR of it is no number: values left the range of float32.
    """
    quantized = fit.layer
    outputs = quantized.outputs or quantized.activated
    weights = quantized.weights
    codes_bits = 32 if weights is None else weights.bits
    _check_finite(layer.name, fit)
    qparams = [q for q in (weights, quantized.inputs, quantized.outputs, quantized.activated) if q]
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        activation=layer.activation,
        kernel_shape=layer.kernel_shape,
        output_shape=layer.output_shape[1:],
        weight_bits=weights and weights.bits,
        input_bits=quantized.inputs and quantized.inputs.bits,
        output_bits=outputs and outputs.bits,
        weight_scale=None if weights is None else _ends(weights.step),
        input_scale=_scale(quantized.grid),
        input_zero_point=0 if isinstance(quantized.inputs, Signs) else _zero_point(quantized.grid),
        output_scale=_scale(outputs),
        output_zero_point=_zero_point(outputs),
        weight_sqnr_db=float(fit.weight_sqnr_db),
        output_sqnr_db=fit.output_sqnr_db,
        weight_clip=_number(fit.weight_clip),
        input_clip=_number(fit.input_clip),
        output_clip=_number(fit.output_clip),
        macs=layer.macs,
        bytes_float=4 * (quantized.kernel.size + quantized.bias.size),
        bytes_quantized=math.ceil(quantized.kernel.size * codes_bits / 8)
        + quantized.bias.nbytes
        + sum(_table_bytes(q) for q in qparams),
        input_shape=layer.input_shape[1:],
    )


def _check_finite(name: str, fit: Fit) -> None:
    for tensor, decibels in {"weights": fit.weight_sqnr_db, "output": fit.output_sqnr_db}.items():
        if decibels is not None and math.isnan(decibels):
            raise ValueError(
                f"layer {name!r} cannot be quantized: the SQNR of its {tensor} is not a number, as "
                "values leave the range of float32. Rescale its kernel and what it reads."
            )


def _table_bytes(format: Any) -> int:
    """What a format takes in addition to codes: scales, zero points, levels; not limits."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(format)) - (
        format.qmin.nbytes + format.qmax.nbytes if format.is_uniform else 0
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _ends(scale: jax.Array) -> tuple[float, float]:
    scales = np.asarray(scale)
    return float(scales.min()), float(scales.max())


def _scale(format: ActivationFormat | None) -> float | None:
    return float(np.asarray(format.scale).mean()) if isinstance(format, QParams) else None


def _zero_point(format: ActivationFormat | None) -> int | None:
    if not isinstance(format, QParams) or format.zero_point.ndim:
        return None
    return int(format.zero_point)


WIDTH = 98  # columns of text


class Report(Sequence[LayerReport]):
    """A record per layer in dataflow order; `str(report)` is a table of at most 100 columns.

    Attributes:
      recipe: what was asked for.
      skipped: products that stayed in float, and why.
      sums: a record per value between layers that has a grid of its own.
      matmuls: a record per quantized product of two activations.
      tables: a record per quantized table.
    """

    def __init__(
        self,
        layers: Sequence[LayerReport],
        recipe: Recipe,
        skipped: Sequence[Skipped],
        sums: Sequence[SumReport] = (),
        matmuls: Sequence[MatmulReport] = (),
        tables: Sequence[TableReport] = (),
    ) -> None:
        self._layers = tuple(layers)
        self.recipe = recipe
        self.skipped: tuple[Skipped, ...] = tuple(skipped)
        self.sums: tuple[SumReport, ...] = tuple(sums)
        self.matmuls: tuple[MatmulReport, ...] = tuple(matmuls)
        self.tables: tuple[TableReport, ...] = tuple(tables)

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerReport]: ...
    def __getitem__(self, index: int | slice) -> LayerReport | Sequence[LayerReport]:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Report) and vars(self) == vars(other)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """The table in at most so many columns of text.

        Args:
          width: of the terminal; where it is narrow, layers are grouped by the folders of their
            names, the columns that say least are left out, and names are shortened.
        """
        rows = [*map(_table_row, self.tables), *self._sum_rows("")]
        for layer in self:
            rows += [_row(layer), *self._sum_rows(layer.name)]
        most = {"most": width, "spared": _SPARED}
        lines = [table(_HEADER, rows, "<<<<<>>>>", footer=self._total(), **most)]
        if not self.recipe.sequential and any(layer.output_sqnr_db is not None for layer in self):
            lines.append("out dB: of each layer alone, its input being that of the float network")
        if any(layer.has_dynamic_input or layer.has_dynamic_output for layer in self):
            lines.append("d: dynamic, the range is found at run time")
        return "\n".join([*lines, *in_float(self.skipped, width)])

    def plot(self, axes: Any = None) -> Any:
        """Draws the signal to noise ratios of all layers, in dB, for a notebook.

        Args:
          axes: of matplotlib, to draw on; by default those of a new figure.

        Returns:
          The axes.

        Raises:
          ImportError: if there is no matplotlib.

        Examples:
          >>> import jax.numpy as jnp, qjax
          >>> params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
          >>> q = qjax.quantize(lambda p, x: x @ p["w"], params, jnp.eye(2), bits=8)
          >>> [text.get_text() for text in q.report.plot().get_yticklabels()]
          ['w']
        """
        charts.require()
        names = [layer.name for layer in self]
        if axes is None:
            from matplotlib import pyplot

            size = charts.inches(charts.rows_size(names))
            axes = pyplot.figure(figsize=size, layout="constrained").subplots()
        ratios = {
            "weights": [layer.weight_sqnr_db for layer in self],
            "outputs": [layer.output_sqnr_db for layer in self],
        }
        series = {
            name: [math.nan if ratio is None else ratio for ratio in column]
            for name, column in ratios.items()
        }
        charts.dots(axes, names, series, {"weights": charts.BLUE, "outputs": charts.ORANGE})
        axes.set_xlabel("signal to quantization noise, dB")
        axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return axes

    def _sum_rows(self, layer: str) -> list[tuple[str, ...]]:
        sums = [_sum_row(record) for record in self.sums if record.layer == layer]
        return [_matmul_row(m) for m in self.matmuls if m.layer == layer] + sums

    def _total(self) -> tuple[str, ...]:
        sizes = [sum(getattr(layer, f"bytes_{kind}") for layer in self) for kind in _KINDS]
        others = *self.sums, *self.matmuls, *self.tables
        sizes[0] += sum(record.bytes_float for record in self.tables)
        sizes[1] += sum(record.bytes_quantized for record in others)
        macs = sum(record.macs for record in (*self, *self.matmuls))
        return (f"{len(self)} layers", *[""] * 6, si(macs), " → ".join(map(si, sizes)))


_KINDS = ("float", "quantized")
_HEADER = (
    *("layer", "kind", "kernel", "bits w/i/o", "activation"),
    *("w dB", "out dB", "MACs", "bytes"),
)
_SPARED = ("kind", "activation", "MACs", "kernel", "w dB", "bytes")


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        product(layer.kernel_shape),
        layer.widths,
        layer.activation,
        _db(layer.weight_sqnr_db),
        _db(layer.output_sqnr_db),
        si(layer.macs),
        f"{si(layer.bytes_float)} → {si(layer.bytes_quantized)}",
    )


def _table_row(record: TableReport) -> tuple[str, ...]:
    return (
        record.name,
        record.kind,
        product(record.shape),
        f"{record.bits}/–/–",
        "none",
        _db(record.sqnr_db),
        "",
        "",
        f"{si(record.bytes_float)} → {si(record.bytes_quantized)}",
    )


def _sum_row(record: SumReport) -> tuple[str, ...]:
    return (
        record.name,
        record.kind,
        "",
        f"–/–/{record.bits}",
        record.activation,
        "",
        _db(record.sqnr_db),
        "",
        f"0 → {record.bytes_quantized}",
    )


def _matmul_row(record: MatmulReport) -> tuple[str, ...]:
    return (
        record.name,
        record.kind,
        " · ".join(map(product, record.shapes[:2])),
        record.widths,
        "none",
        "",
        _db(record.output_sqnr_db),
        si(record.macs),
        f"0 → {record.bytes_quantized}",
    )


def in_float(skipped: Sequence[Skipped], width: int = WIDTH) -> list[str]:
    """Lines of text about what stays in float."""
    lines = []
    for skip in skipped:
        shapes = " and ".join(map(product, skip.shapes))
        line = f"in float: {skip.primitive} of {shapes}: {skip.reason}"
        lines += textwrap.wrap(printable(line), width, subsequent_indent="  ")
    return lines


def product(shape: Sequence[int]) -> str:
    """A shape as text: 3×3×16."""
    return "×".join(map(str, shape))


def _db(value: float | None) -> str:
    if value is None:
        return "–"
    return "∞" if value == math.inf else f"{value:.1f}"


def si(value: float) -> str:
    """A number with three digits and a prefix: 123, 4.56k, 78.9M."""
    for prefix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}G"
