"""Studies: one question each, answered by quantizing the same network in several ways."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from qjax.fit.data_free import UnknownRangeError
from qjax.formats.scales import SCALES
from qjax.formats.spec import FORMATS, MAX_BITS, KernelGranularity, QuantSpec
from qjax.graph.layers import shapes_of
from qjax.kept import Kept
from qjax.objectives.errors import MSE, OUTPUT_MSE
from qjax.objectives.table import OBJECTIVES
from qjax.progress import Progress
from qjax.quantize import Quantized, quantize
from qjax.recipe import ACTIVATIONS, OutputPosition, Recipe
from qjax.study.accuracy import predict
from qjax.study.sensitivity import at_width
from qjax.table import table

WIDTHS = (8, 4)
ALL_WIDTHS = tuple(range(2, MAX_BITS + 1))
FIXED_POINT_WIDTHS = (8, 6, 4)
CODEBOOK_WIDTHS = (4, 3)
GROUP_SIZES = (64, 16)
AGREEMENT = 99.0  # percent of the calibration images, at which a width is good enough

Labels = tuple[str, ...]


class WayToRanges(NamedTuple):
    """Where the ranges of activations come from.

    Attributes:
      label: in a table.
      recipe: how to quantize.
      has_images: whether there are images to calibrate on.
    """

    label: str
    recipe: Recipe
    has_images: bool = True


Cases = Iterator[tuple[Labels, Recipe | WayToRanges]]
Run = Callable[[Recipe], Quantized]


class Row(NamedTuple):
    """One way to quantize a network, and what came of it.

    Attributes:
      labels: what was varied, under the study's header.
      top1: share of right answers in percent.
      agreement: share of the calibration images predicted as by the float network, in percent.
      logits_sqnr_db: SQNR of the logits on the calibration images.
      bytes: of kernels and biases with their scales, at their true widths.
    """

    labels: Labels
    top1: float
    agreement: float
    logits_sqnr_db: float
    bytes: int


class Study(NamedTuple):
    """A table; `str(study)` writes it.

    Attributes:
      name: of the study.
      question: what it answers.
      header: what the labels of the rows are.
      float_top1: share of right answers of the float network in percent.
      rows: in order.
      refused: what could not be done, and why.
    """

    name: str
    question: str
    header: Labels
    float_top1: float
    rows: tuple[Row, ...]
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = (line for text in self.refused for line in ("", *textwrap.wrap(text, 98)))
        shown = summary(self.header, self.rows, self.float_top1)
        return "\n".join((self.question, "", shown, *lines))


def cells(header: Labels, rows: Sequence[Row], float_top1: float) -> list[tuple[str, ...]]:
    """The lines of a table, a text per column: the header, the rows, the float network."""
    lines = [(*header, "top-1", "agreement", "logits dB", "bytes")]
    for row in rows:
        numbers = (f"{row.top1:.2f}", f"{row.agreement:.1f}", f"{row.logits_sqnr_db:.1f}")
        lines.append((*row.labels, *numbers, f"{row.bytes:,}"))
    if rows:
        lines.append(("float", *[""] * (len(header) - 1), f"{float_top1:.2f}", "100.0", "", ""))
    return lines


def summary(header: Labels, rows: Sequence[Row], float_top1: float) -> str:
    """Writes rows below a header, numbers to the right."""
    first, *others = cells(header, rows, float_top1)
    return table(first, others, "<" * len(header) + ">>>>")


class Question(NamedTuple):
    """A study to be made.

    Attributes:
      text: the question.
      header: what varies.
      widths: widths in bits that it is asked at by default.
      cases: of (base recipe, widths, run): what to quantize how.
    """

    text: str
    header: Labels
    widths: tuple[int, ...]
    cases: Callable[[Recipe, Sequence[int], Run], Cases]


def study(
    name: str,
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    top1: Callable[[Any, Any], float],
    base: Recipe | None = None,
    *,
    widths: Sequence[int] | None = None,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Study:
    """Makes a study.

    Args:
      name: one of `QUESTIONS`.
      apply_fn: a pure inference function of (params, x).
      params: pytree of arrays.
      batches: calibration images, one array float[N, ...].
      top1: accuracy in percent, of (apply_fn, params).
      base: the recipe that the study varies; by default 8 bits everywhere.
      widths: in bits; by default the question's own.
      progress: called with (case, cases done, cases).
      kept: the rows of a run that was interrupted; by default none.

    Returns:
      A `Study`.

    Raises:
      ValueError: there is no such study.
    """
    if name not in QUESTIONS:
        raise ValueError(f"`name` must be one of {', '.join(QUESTIONS)}; got {name!r}.")
    question = QUESTIONS[name]
    kept = kept or Kept()
    measure = Measure(apply_fn, params, batches, top1)
    cases = list(question.cases(base or Recipe(), widths or question.widths, measure.quantize))
    rows, refused = [], []
    for done, (labels, way) in enumerate(cases):
        if progress is not None:
            progress(", ".join(labels), done, len(cases))
        try:
            row = kept.of(" ".join(labels), lambda way=way: measure.row((), measure.quantize(way)))
            rows.append(Row(*row)._replace(labels=labels))
        except UnknownRangeError as error:
            refused.append(f"not possible: {', '.join(labels)}: {error}")
    float_top1 = top1(apply_fn, params)
    return Study(name, question.text, question.header, float_top1, tuple(rows), tuple(refused))


class Measure:
    """Quantizes one network in several ways and measures each."""

    def __init__(
        self,
        apply_fn: Callable[[Any, Any], Any],
        params: Any,
        batches: Any,
        top1: Callable[[Any, Any], float],
    ) -> None:
        """Takes what `study` takes."""
        self._network = apply_fn, params, batches
        self._top1 = top1
        self._logits = predict(apply_fn, params, batches)

    def quantize(self, way: Recipe | WayToRanges) -> Quantized:
        """Quantizes the network."""
        if isinstance(way, Recipe):
            return quantize(*self._network, way)
        apply_fn, params, batches = self._network
        given = batches if way.has_images else shapes_of(batches)
        return quantize(apply_fn, params, given, way.recipe)

    def row(self, labels: Labels, q: Quantized) -> Row:
        """Measures a quantized network."""
        logits = predict(q.apply_fn, q.params, self._network[2])
        noise = float(np.sum((logits - self._logits) ** 2))
        signal = float(np.sum(self._logits**2))
        sqnr = 10 * np.log10(signal / noise) if noise else np.inf
        agreement = 100 * float(np.mean(logits.argmax(-1) == self._logits.argmax(-1)))
        size = sum(record.bytes_quantized for record in q.report)
        return Row(labels, self._top1(q.apply_fn, q.params), agreement, float(sqnr), size)


def search_bits(
    measure: Measure,
    base: Recipe,
    wanted: float = AGREEMENT,
    progress: Progress | None = None,
) -> tuple[Quantized, tuple[Row, ...]]:
    """Starts at 2 bits and adds one until the network predicts what the float network does.

    Neither labels nor test images choose: agreement is counted on the calibration images.

    Args:
      measure: the network and how to measure it.
      base: the recipe whose widths change.
      wanted: agreement in percent that is good enough.
      progress: called with (what is tried, widths done, widths).

    Returns:
      The first network that is good enough, or the last one, and a row per width tried.
    """
    rows = []
    for bits in ALL_WIDTHS:
        if progress is not None:
            progress(f"{bits} bits", len(rows), len(ALL_WIDTHS))
        q = measure.quantize(at_width(base, bits))
        rows.append(measure.row((str(bits),), q))
        if rows[-1].agreement >= wanted or bits == MAX_BITS:
            break
    return q, tuple(rows)  # pyright: ignore[reportPossiblyUnboundVariable]


# ---- The questions


def _at(base: Recipe, fields: Sequence[str], bits: int, **changes: Any) -> dict[str, Any]:
    specs = {field: getattr(base, field) for field in fields}
    return {
        field: spec and dataclasses.replace(spec, bits=bits, **changes)
        for field, spec in specs.items()
    }


def _weight_bits(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        alone = dataclasses.replace(base, inputs=None, outputs=None, **_at(base, ["weights"], bits))
        yield (str(bits),), alone


def _activation_bits(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        fields = _at(base, ["inputs", "outputs"], bits)
        yield (str(bits),), dataclasses.replace(base, weights=None, **fields)


def _granularity(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        for granularity in get_args(KernelGranularity):
            for size in GROUP_SIZES if granularity == "per_group" else (0,):
                changes: dict[str, Any] = {"granularity": granularity}
                changes |= {"group_size": size} if size else {}
                fields = _at(base, ["weights"], bits, **changes)
                label = f"{granularity} of {size}" if size else granularity
                recipe = dataclasses.replace(base, inputs=None, outputs=None, **fields)
                yield (str(bits), label), recipe


def _symmetry(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        plain = at_width(base, bits)
        for symmetric in (True, False):
            label = "symmetric signed" if symmetric else "asymmetric"
            fields = _at(plain, ["weights"], bits, symmetric=symmetric)
            alone = dataclasses.replace(plain, inputs=None, outputs=None, **fields)
            yield (str(bits), "weights", label), alone
        activations = dataclasses.replace(plain, weights=None)
        for symmetric in (True, False):
            label = "symmetric signed" if symmetric else "asymmetric where a value is negative"
            fields = _at(activations, ["inputs", "outputs"], bits, symmetric=symmetric)
            yield (str(bits), "activations", label), dataclasses.replace(activations, **fields)
        unsigned = dataclasses.replace(
            activations, **_at(activations, ["inputs", "outputs"], bits, symmetric=False)
        )
        label = "symmetric unsigned, signed where a value is negative"
        overrides = [*unsigned.overrides, *_without_zero_points(unsigned, run).items()]
        yield (str(bits), "activations", label), dataclasses.replace(unsigned, overrides=overrides)


def _without_zero_points(recipe: Recipe, run: Run) -> dict[str, dict[str, QuantSpec]]:
    """Signed formats where the asymmetric network has a zero point that is not 0."""
    report = run(recipe).report
    formats = recipe.by_layer([record.name for record in report])
    overrides: dict[str, dict[str, QuantSpec]] = {}
    for record in report:
        codes = {"inputs": record.input_zero_point, "outputs": record.output_zero_point}
        overrides[record.name] = {
            field: dataclasses.replace(getattr(formats[record.name], field), symmetric=True)
            for field, zero_point in codes.items()
            if zero_point != 0 and getattr(formats[record.name], field) is not None
        }
    return overrides


def _output_position(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        for method in (OUTPUT_MSE.name, MSE.name):
            for position in get_args(OutputPosition):
                recipe = dataclasses.replace(
                    at_width(base, bits), output_position=position, range_method=method
                )
                yield (str(bits), position, method), recipe


def _range_method(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        for method in OBJECTIVES:
            recipe = dataclasses.replace(at_width(base, bits), range_method=method)
            yield (str(bits), method), recipe


def _fixed_point(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    parts = {"weights": ["weights"], "activations": ["inputs", "outputs"], "all": _SPECS}
    for bits in widths:
        recipe = at_width(base, bits)
        for name in SCALES:
            for part, fields in parts.items():
                yield (str(bits), part, name), _alone(recipe, fields, bits, scale=name)


def _weight_format(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        for name, family in FORMATS.items():
            if bits in family.widths and len(family.widths) > 1:
                yield (str(bits), name), _alone(base, ["weights"], bits, format=name)


def ways_to_ranges(base: Recipe) -> tuple[WayToRanges, ...]:
    """Static, dynamic and weight-only quantization, with images and without.

    Args:
      base: the recipe to vary.

    Returns:
      The ways. All but the first leave outputs in float, as dynamic quantization does. Without
      images static ranges are those of batch norm; that of the first layer's input is found at run
      time.
    """
    activations = base.inputs or ACTIVATIONS
    dynamic = dataclasses.replace(activations, granularity="per_tensor", ranges="dynamic")
    by_example = dataclasses.replace(dynamic, granularity="per_example")
    inputs = dataclasses.replace(base, outputs=None)
    at_run_time = dataclasses.replace(inputs, inputs=dynamic)
    alone = dataclasses.replace(inputs, inputs=None)
    first = [*base.overrides, ("@first", {"inputs": dynamic})]
    return (
        WayToRanges("static, inputs and outputs", base),
        WayToRanges("static, inputs", inputs),
        WayToRanges("dynamic per tensor", at_run_time),
        WayToRanges("dynamic per example", dataclasses.replace(inputs, inputs=by_example)),
        WayToRanges("weights alone", alone),
        WayToRanges(
            "no images: static by batch norm", dataclasses.replace(inputs, overrides=first), False
        ),
        WayToRanges("no images: dynamic per tensor", at_run_time, False),
        WayToRanges("no images: weights alone", alone, False),
    )


def _ranges(base: Recipe, widths: Sequence[int], run: Run) -> Cases:
    for bits in widths:
        for way in ways_to_ranges(at_width(base, bits)):
            yield (str(bits), way.label), way


def _alone(recipe: Recipe, fields: Sequence[str], bits: int, **changes: Any) -> Recipe:
    """A recipe that quantizes some tensors and leaves the others in float."""
    in_float = dict.fromkeys(_SPECS)
    return dataclasses.replace(recipe, **in_float | _at(recipe, fields, bits, **changes))


_SPECS = ("weights", "inputs", "outputs")

QUESTIONS = {
    "weight-bits": Question(
        "How many bits do the weights need? (activations in float)",
        ("weight bits",),
        ALL_WIDTHS,
        _weight_bits,
    ),
    "activation-bits": Question(
        "How many bits do the activations need? (weights in float)",
        ("activation bits",),
        ALL_WIDTHS,
        _activation_bits,
    ),
    "granularity": Question(
        "A scale per tensor, per output channel or per group? (weights; activations in float)",
        ("bits", "weights"),
        WIDTHS,
        _granularity,
    ),
    "symmetry": Question(
        "Symmetric signed, symmetric unsigned or asymmetric? (the other tensors in float)",
        ("bits", "tensors", "codes"),
        WIDTHS,
        _symmetry,
    ),
    "output-position": Question(
        "Round outputs before the activation, after it, or both?",
        ("bits", "position", "range method"),
        WIDTHS,
        _output_position,
    ),
    "range-method": Question(
        "Which cost function chooses the clipping ranges best?",
        ("bits", "range method"),
        WIDTHS,
        _range_method,
    ),
    "weight-format": Question(
        "What do codebooks gain over uniform weights? (activations in float; nf4 is quantile at 4)",
        ("bits", "format"),
        CODEBOOK_WIDTHS,
        _weight_format,
    ),
    "fixed-point": Question(
        "What does it cost that every scale is a power of two? (the other tensors in float)",
        ("bits", "tensors", "scales"),
        FIXED_POINT_WIDTHS,
        _fixed_point,
    ),
    "dynamic": Question(
        "Static ranges, dynamic ones, or weights alone? With images and without",
        ("bits", "ranges of activations"),
        WIDTHS,
        _ranges,
    ),
}
