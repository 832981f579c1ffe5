"""Writes the answers to a student's five questions with a model's own measured numbers.

python scripts/study.py --model resnet20-cifar10 --out docs/study.md
python scripts/study.py --model resnet20-digits --calibration-size 256 --thrifty > digits.md
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import jax.numpy as jnp
from markdown_tables import markdown_table

import pretrained
import qjax
from pretrained import datasets
from qjax import atomic
from qjax.fit.moments import moments
from qjax.fit.observers import observe
from qjax.fit.samples import KernelSample, kernel_loss
from qjax.fit.sampling import MOMENT_PATCHES, patch_stride
from qjax.fit.search import least
from qjax.formats.affine import sqnr_db
from qjax.formats.base import elementwise
from qjax.graph.layers import find_layers, shapes_of
from qjax.objectives.errors import OUTPUT_MSE
from qjax.rounding.gptq import round_gptq
from qjax.rounding.nearest import round_nearest
from qjax.rounding.sweeps import coordinate_sweeps
from qjax.run.tap import float_layers, tapped
from qjax.study.curves import Curves, layer_curves
from qjax.study.explain import explain
from qjax.study.questions import Measure, Row
from qjax.study.sensitivity import at_width

SIZE = 1024  # calibration images
SAMPLE = 128  # calibration images that one layer is looked at with
BASE = qjax.Recipe()
THRIFTY = qjax.Recipe(rounding="nearest", sweeps=0, reconstructions=0, sequential=False)
WIDTHS = (8, 6, 5, 4, 3, 2)
FEW_WIDTHS = (8, 4, 2)  # thriftily


def main() -> None:
    """Parses the command line and writes the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="resnet20-cifar10", metavar="NAME|PATH", help="(%(default)s)")
    add("--layer", metavar="NAME", help="the layer to look at (the middle convolution)")
    add("--calibration-size", type=int, default=SIZE, metavar="N", help="(%(default)s)")
    add("--thrifty", action="store_true", help="nearest rounding, float inputs, fewer widths")
    add("--out", type=Path, metavar="FILE", help="where to write it (standard output)")
    arguments = parser.parse_args()
    text = document(arguments.model, arguments.calibration_size, arguments.thrifty, arguments.layer)
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.parent.mkdir(exist_ok=True)
        atomic.write(arguments.out, text)


def document(name: str, calibration_size: int, thrifty: bool, layer: str | None = None) -> str:
    """Measures a model and writes the document.

    Args:
      name: of the model.
      calibration_size: training images to calibrate on.
      thrifty: whether to use the recipe that compiles fastest.
      layer: to look at; by default the middle one of the convolutions that a ReLU follows.
    """
    subject = Subject(name, calibration_size, thrifty, layer)
    return "\n\n".join(section(subject) for section in SECTIONS) + "\n"


class Subject:
    """One model with its data, and what is measured on it."""

    def __init__(self, name: str, size: int, thrifty: bool, layer: str | None) -> None:
        """Loads the model and its data."""
        self.model = model = pretrained.load(name)
        self.size, self.thrifty, self.base = size, thrifty, THRIFTY if thrifty else BASE
        train = datasets.load(model.dataset, "train")
        self.test = datasets.load(model.dataset, "test")
        draw = datasets.calibration_draw(train.images, min(size, len(train.images)), 0)
        self.calibration = model.preprocess(draw)
        self.sample = jnp.asarray(self.calibration[:SAMPLE])
        self.network = find_layers(model.apply_fn, shapes_of(model.params), shapes_of(self.sample))
        self.layers = {site.layer.name: site.layer for site in self.network.sites}
        self.layer = self.layers[layer or self._middle()]
        [self.site] = [s for s in self.network.sites if s.layer is self.layer]
        top1 = partial(
            qjax.top1, images=self.test.images, labels=self.test.labels, preprocess=model.preprocess
        )
        self.top1 = top1(model.apply_fn, model.params)
        self._measure = Measure(model.apply_fn, model.params, self.calibration, top1)
        self.quantize = cache(self._measure.quantize)
        self.floats = float_layers(self.network, model.params)
        taps = tapped(model.apply_fn, shapes_of(model.params), self.sample, [self.layer.name])
        self.x = taps(self.floats, self.sample)[1][self.layer.name].input

    def _middle(self) -> str:
        names = [
            name
            for name, layer in self.layers.items()
            if "conv" in layer.kind and layer.activation == "relu"
        ]
        names = names or list(self.layers)
        return names[len(names) // 2]

    def row(self, recipe: qjax.Recipe, *labels: str) -> Row:
        """Quantizes and measures, once per recipe."""
        return self._row(recipe)._replace(labels=labels)

    @cache  # noqa: B019
    def _row(self, recipe: qjax.Recipe) -> Row:
        return self._measure.row((), self.quantize(recipe))

    @cache  # noqa: B019
    def curves(self, bits: int) -> dict[str, Curves]:
        """The cost functions of the layer's tensors."""
        formats = at_width(BASE, bits)
        folded = self.floats["layers"][self.layer.name]
        found = layer_curves(self.site, folded, self.x, formats)
        return {curves.tensor: curves for curves in found}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all of it on the left."""
    return markdown_table(header, rows, "<" * len(header))


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.4g}"


# ---- Sections


def _head(s: Subject) -> str:
    base = "nearest rounding of every layer on float inputs" if s.thrifty else "the default recipe"
    size = f" --calibration-size {s.size}" if s.size != SIZE else ""
    flags = f"{size}{' --thrifty' if s.thrifty else ''}"
    return f"""# Questions a student of quantization is asked: {s.model.name}

Measured by `python scripts/study.py --model {s.model.name}{flags}`, which writes this file: \
calibration on {len(s.calibration):,} training images without labels, accuracy on all \
{len(s.test.images):,} test images of {s.model.dataset}, {base} where nothing else is said. The \
float network has {s.top1:.2f} % top-1. dB is signal to noise, 10·log10(Σx² / Σ(x − x̂)²): 6 dB \
more is half the error, what one more bit brings. The layer looked at is `{s.layer.name}`, \
{s.layer.kind} {"×".join(map(str, s.layer.kernel_shape))}, activation {s.layer.activation}. The \
equations are in [method.md](method.md)."""


def _dataflow(s: Subject) -> str:
    q = s.quantize(at_width(s.base, 8))
    x = s.model.preprocess(s.test.images[:1])
    explanation = explain(q, s.layer.name, x, s.model.params)
    rows = [
        (
            str(index),
            step.name,
            step.equation.replace("|", "\\|"),
            step.number,
            "  ".join(map(_number, step.values[:4])),
            "" if step.sqnr_db is None else f"{step.sqnr_db:.1f}",
        )
        for index, step in enumerate(explanation.steps, 1)
    ]
    notes = {step.name: step.note.replace("\n", "; ") for step in explanation.steps}
    steps = table(("", "step", "arithmetic", "number", "values", "dB"), rows)
    return f"""## 1. The dataflow of one complete convolution layer

Test image 0, output channel {explanation.channel} at position {explanation.position}; of the \
{explanation.patch} elements of its patch four of those with the largest products are shown. The \
last column compares all values of that step with the float network, all earlier layers \
quantized too.

{steps}

- The input: {notes["input codes"]}.
- The products: {notes["products"]}.
- The accumulator: {notes["accumulator"]}.
- The requantization: {notes["requantization"]}.
- The clamp: {notes["zero point and clamp"]}.
- De-quantization: {notes["de-quantization"]}."""


def _choices(s: Subject, tensor: str) -> tuple[str, dict[int, Curves]]:
    by_width = {bits: s.curves(bits)[tensor] for bits in (8, 4)}
    rows = [
        (
            choice.method,
            *itertools.chain.from_iterable(
                (f"{100 * c.share:.1f} %", f"{c.tensor_sqnr_db:.1f}", f"{c.output_sqnr_db:.1f}")
                for c in (choice, by_width[4].choices[index])
            ),
        )
        for index, choice in enumerate(by_width[8].choices)
    ]
    columns = ("range kept", "tensor dB", "output dB")
    header = ("cost function", *(f"{column}, {bits} bits" for bits in (8, 4) for column in columns))
    return table(header, rows), by_width


def _verdict(curves: Curves) -> str:
    """Says what `output_mse` is worth at the layer's output."""
    found = {choice.method: choice.output_sqnr_db for choice in curves.choices}
    own = found.pop("output_mse")
    gaps = ", ".join(f"{own - value:+.1f} dB against {method}" for method, value in found.items())
    return f"At {curves.bits} bits `output_mse` is worth, at the layer's output: {gaps}."


def _weights(s: Subject) -> str:
    choices, by_width = _choices(s, "weights")
    rows = [(str(bits), *_rounding(s, bits)) for bits in (8, 4)]
    methods = table(("bits", "nearest", "GPTQ", "GPTQ and two sweeps"), rows)
    return f"""## 2. Quantizing one layer's weights to 8 bits: the cost function, and better ones

The weights of `{s.layer.name}`, a scale per output channel, rounded to nearest; a candidate keeps \
a share of each channel's largest magnitude. `output_mse`, the default, is the error of the \
layer's output, eᵀHe with H = E[xxᵀ] from the calibration images; `mse` is that of the tensor, \
`kl` the divergence of its distribution.

{choices}

{_verdict(by_width[8])} {_verdict(by_width[4])}

Better than any cost function for the range is a better rounding: the same ranges (`output_mse`), \
and the output in dB when each rounding error is made up for by the elements still to be rounded \
(GPTQ), and when codes and scales are then improved in turn (sweeps):

{methods}"""


def _rounding(s: Subject, bits: int) -> tuple[str, ...]:
    operation, kernel = s.layer.operation, s.floats["layers"][s.layer.name].kernel
    spec = at_width(BASE, bits).weights
    assert spec is not None
    stride = patch_stride(operation, s.x[None], MOMENT_PATCHES)
    hessian = observe(moments(operation, stride), [s.x]).hessian
    format = least(OUTPUT_MSE, KernelSample(kernel, spec, hessian), spec)
    gptq = round_gptq(kernel, hessian, format)
    swept = coordinate_sweeps(gptq, kernel, hessian, format, 2)
    found = []
    for codes, refitted in ((round_nearest(kernel, format), format), (gptq, format), swept):
        kernel_hat = elementwise(refitted, kernel.shape[1]).decode(codes)
        signal, noise = (
            float(jnp.sum(kernel_loss(error, hessian))) for error in (kernel, kernel_hat - kernel)
        )
        decibels = 10 * math.log10(signal / noise)
        found.append(f"{decibels:.1f} (kernel {float(sqnr_db(kernel, kernel_hat)):.1f})")
    return tuple(found)


def _activations(s: Subject) -> str:
    inputs, by_width = _choices(s, "input")
    outputs, by_output_width = _choices(s, "output")
    return f"""## 3. Quantizing the input and output of one convolution layer to 8 bits

The input of `{s.layer.name}`, one scale for the tensor. `output_mse` is the error W·(x̂ − x) of \
the layer's output on sampled patches; the last column of each width is that error for every \
choice.

{inputs}

{_verdict(by_width[8])} {_verdict(by_width[4])}

The output before the activation, clipped as the activation clips it: under a ReLU the negative \
half costs no codes, the range starts at 0, and the clamp is the ReLU, whatever the cost function. \
`output_mse` is the error after the activation, E‖act(ẑ) − act(z)‖².

{outputs}

{_verdict(by_output_width[8])} {_verdict(by_output_width[4])}"""


def _accuracy(s: Subject, header: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [
        (*row.labels, f"{row.top1:.2f}", f"{row.agreement:.1f}", f"{row.logits_sqnr_db:.1f}")
        for row in rows
    ]
    lines.append(("float", *[""] * (len(header) - 1), f"{s.top1:.2f}", "100.0", "exact"))
    return table((*header, "top-1", "agreement", "logits dB"), lines)


def _few_bits(s: Subject) -> str:
    rows = []
    for bits in FEW_WIDTHS if s.thrifty else WIDTHS:
        at = at_width(s.base, bits)
        rows.append(s.row(at, str(bits), "weights and activations"))
        if bits == 2 or (bits == 4 and not s.thrifty):
            weights = dataclasses.replace(at, inputs=None, outputs=None)
            rows.append(s.row(weights, str(bits), "weights"))
            rows.append(s.row(dataclasses.replace(at, weights=None), str(bits), "activations"))
        if bits <= 4 and not s.thrifty:
            ends = dataclasses.replace(
                at, overrides=[("@first", {"bits": 8}), ("@last", {"bits": 8})]
            )
            rows.append(s.row(ends, str(bits), "all, first and last layer at 8"))
    together = {row.labels[0]: row for row in rows if row.labels[1] == "weights and activations"}
    lost = [f"{s.top1 - row.top1:.2f} at {bits}" for bits, row in together.items()]
    fall = (together["8"].logits_sqnr_db - together["4"].logits_sqnr_db) / 4
    weights, activations = (
        next(row for row in rows if row.labels == ("2", part)).logits_sqnr_db
        for part in ("weights", "activations")
    )
    return f"""## 4. Six bits and fewer: what happens, and what the concern is

{_accuracy(s, ("bits", "what is quantized"), rows)}

Top-1 points lost, weights and activations together: {", ".join(lost)} bits. From 8 to 4 bits the \
logits lose {fall:.1f} dB per bit. At 2 bits a weight has 3 codes and an activation 4: the \
weights alone leave the logits at {weights:.1f} dB, the activations alone at {activations:.1f} dB; \
the lower of the two is the concern. Two bits fewer are a quarter of the codes and four times the \
error: the errors of all layers add up, and where their sum reaches the distance between the two \
largest logits, predictions change.{_refits(s)}"""


def _refits(s: Subject) -> str:
    if s.thrifty:
        return ""
    return (
        " Kernels that are quantized are also refitted to their rounded inputs, those left in "
        "float are not: activations alone can cost more than both together."
    )


def _position(s: Subject) -> str:
    rows = []
    for bits in (4,) if s.thrifty else (8, 4):
        positions = ("pre_activation", "post_activation", "both")[: 2 if s.thrifty else 3]
        for method, position in itertools.product(("output_mse", "mse"), positions):
            recipe = dataclasses.replace(
                at_width(s.base, bits), output_position=position, range_method=method
            )
            rows.append(s.row(recipe, str(bits), position, method))
    at = {row.labels: row.logits_sqnr_db for row in rows}
    by_tensor, by_output = (
        at["4", "post_activation", method] - at["4", "pre_activation", method]
        for method in ("mse", "output_mse")
    )
    return f"""## 5. Quantizing before and after the activation: what it does to accuracy

{_accuracy(s, ("bits", "outputs rounded", "ranges by"), rows)}

Rounding after the activation instead of before it changes the logits by {by_output:+.1f} dB at 4 \
bits with ranges by `output_mse`, and by {by_tensor:+.1f} dB with ranges by `mse`: where a ReLU \
follows, the range before it starts at 0, the clamp at code 0 is the ReLU and both places give the \
same codes; where none follows, as before a residual sum, there is only one place. What is left \
comes from the fit, which before the activation aims at the float output and after it at the \
values it rounds."""


SECTIONS = (_head, _dataflow, _weights, _activations, _few_bits, _position)


if __name__ == "__main__":
    main()
