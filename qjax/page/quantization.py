"""The report as one self-contained page: what quantization did, in numbers and pictures.

`gather` measures, `render` writes; nothing on the page is fetched from a network.
"""

import base64
import itertools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax import charts
from qjax.objectives.errors import ABSMAX
from qjax.objectives.table import OBJECTIVES
from qjax.page.document import document
from qjax.progress import Progress
from qjax.quantize import Quantized
from qjax.report import LayerReport, MatmulReport, TableReport, product
from qjax.study.accuracy import Comparison, compare, predict
from qjax.study.cost import cost
from qjax.study.curves import Curves, layer_curves
from qjax.study.quality import Histogram, LayerQuality, quality
from qjax.study.sensitivity import logits_sqnr_alone
from qjax.threads import side_by_side

SAMPLE = 128  # calibration images that the layers are measured on
CURVES = 3  # layers whose cost functions are drawn: the most sensitive ones
WORST = 8  # images shown
FLOAT_MAC = 32 * 32 + 32  # energy of a multiplication and an addition in float, see `cost`
MAX_CLASSES = 20  # of a confusion matrix that is drawn whole


class Facts(NamedTuple):
    """All that the page says.

    Attributes:
      model: its name.
      dataset: its name.
      summary: what was done, a short text.
      records: the layers.
      tables: the quantized tables.
      matmuls: the quantized products of two activations.
      layers: how well each does.
      logits_sqnr_db: of the network's output.
      sensitivity: by layer, SQNR of the logits in dB with that layer alone quantized.
      curves: by layer, the cost functions of its ranges; not every layer has to be there.
      comparison: of the predictions on all test images.
      worst: (image uint8[H, W, 1 or 3], its label) of the first of `comparison.worst`.
      bytes: of all params: (float, quantized).
      energy: per image in any one unit: (float, quantized).
    """

    model: str
    dataset: str
    summary: str
    records: Sequence[LayerReport]
    tables: Sequence[TableReport]
    matmuls: Sequence[MatmulReport]
    layers: Sequence[LayerQuality]
    logits_sqnr_db: float
    sensitivity: Mapping[str, float]
    curves: Mapping[str, Sequence[Curves]]
    comparison: Comparison
    worst: Sequence[tuple[np.ndarray, int]]
    bytes: tuple[int, int]
    energy: tuple[float, float]


def gather(
    q: Quantized,
    model: Any,
    calibration: Any,
    test: Any,
    sizes: tuple[int, int],
    progress: Progress | None = None,
) -> Facts:
    """Measures what the page says.

    Args:
      q: the quantized network.
      model: the float one: `name`, `apply_fn`, `params` and `preprocess`.
      calibration: preprocessed calibration images float[N, ...].
      test: all test images: `images`, `labels` and `name`.
      sizes: bytes of all params: (float, quantized).
      progress: called with (what is measured, steps done, steps).

    Returns:
      The facts.
    """

    def step(name: str, done: int) -> None:
        if progress is not None:
            progress(name, done, 2)

    x = jnp.asarray(calibration[:SAMPLE])
    step("layers, sensitivity, predictions", 0)
    measured, alone, before, after = side_by_side(
        [
            partial(quality, q, model.params, x),
            partial(logits_sqnr_alone, q, model.params, x),
            *(
                partial(predict, apply_fn, params, test.images, model.preprocess)
                for apply_fn, params in ((model.apply_fn, model.params), (q.apply_fn, q.params))
            ),
        ]
    )
    step("cost functions", 1)
    comparison = compare(before, after, test.labels)
    recipes = q.report.recipe.by_layer([record.name for record in q.report])
    sites = {site.layer.name: site for site in measured.network.sites}
    names = sorted(alone, key=alone.__getitem__)[:CURVES]
    found = side_by_side(
        [
            partial(
                layer_curves,
                sites[name],
                measured.floats["layers"][name],
                measured.taps[name].input,
                recipes[name],
            )
            for name in names
        ]
    )
    curves = dict(zip(names, found, strict=True))
    step("", 2)
    total = cost(q).total
    return Facts(
        model.name,
        test.name,
        _summary(q, len(calibration), len(test.images), test.name),
        list(q.report),
        q.report.tables,
        q.report.matmuls,
        measured.layers,
        measured.logits,
        alone,
        curves,
        comparison,
        [(np.asarray(test.images[i]), int(test.labels[i])) for i in comparison.worst[:WORST]],
        sizes,
        (total.macs * FLOAT_MAC, total.energy),
    )


def _summary(q: Quantized, calibration: int, images: int, dataset: str) -> str:
    recipe = q.report.recipe
    widths = ", ".join(
        f"{name} {_widths([getattr(record, field) for record in q.report])}"
        for name, field in _WIDTHS.items()
    )
    return (
        f"{widths}; ranges by {recipe.range_method}, rounding by {recipe.rounding}; "
        f"calibrated on {calibration:,} training images without labels, tested on all "
        f"{images:,} test images of {dataset}."
    )


_WIDTHS = {"weights": "weight_bits", "inputs": "input_bits", "outputs": "output_bits"}


def _widths(bits: Sequence[int | None]) -> str:
    """What the layers have: `8 bits`, `2 to 6 bits`, `8 bits or float`."""
    given = [width for width in bits if width is not None]
    if not given:
        return "float"
    low, high = min(given), max(given)
    text = f"{low} bits" if low == high else f"{low} to {high} bits"
    return text if len(given) == len(bits) else f"{text} or float"


def render(facts: Facts) -> str:
    """Writes the page.

    Args:
      facts: what it says.

    Returns:
      One HTML document that loads nothing.
    """
    sections = (_head, _table, _tables, _matmuls, _quality, _details, _curves, _predictions)
    body = "\n".join(section(facts) for section in sections)
    return document(f"{facts.model}, quantized", body)


def render_curves(title: str, curves: Mapping[str, Sequence[Curves]]) -> str:
    """Writes a page of cost functions alone.

    Args:
      title: plain text.
      curves: by layer, the cost functions of its ranges.

    Returns:
      One HTML document that loads nothing.
    """
    return document(title, f"<h1>{escape(title)}</h1>\n<p>{_READING}</p>\n{_charts(curves)}")


# ---- Sections


def _head(facts: Facts) -> str:
    c = facts.comparison
    size, small = facts.bytes
    before, after = facts.energy
    cards = (
        ("float", f"{c.float_top1:.2f} %", f"top-1, 95 % interval {_span(c.float_interval)}"),
        (
            "quantized",
            f"{c.quantized_top1:.2f} %",
            f"top-1, 95 % interval {_span(c.quantized_interval)}",
        ),
        (
            "difference",
            f"{c.difference:+.2f}",
            f"points on the same images, 95 % interval {_span(c.difference_interval, '+')}",
        ),
        ("same prediction", f"{c.agreement:.2f} %", f"of {c.images:,} images"),
        ("size", f"{size / small:.2f}× smaller", f"{size:,} → {small:,} bytes"),
        (
            "energy",
            f"{before / after:.1f}× less",
            "N_mul·b_w·b_x + N_add·b_acc per image, in bit operations",
        ),
        ("logits", _db(facts.logits_sqnr_db), "signal to noise, end to end"),
    )
    text = "\n".join(
        f'<div class="card"><i>{escape(name)}</i><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in cards
    )
    return (
        f"<h1>{escape(facts.model)}, quantized</h1>\n<p>{escape(facts.summary)}</p>\n"
        f'<div class="cards">\n{text}\n</div>'
    )


_HEADER = (
    *("layer", "kind", "kernel", "bits w/i/o", "activation", "weights dB", "inputs dB"),
    *("outputs dB", "network dB", "alone dB", "MACs", "bytes", "quantized"),
)
_TEXT = 5  # the first columns are words


def _table(facts: Facts) -> str:
    head = "".join(
        f'<th{_css(i)}><button type="button">{escape(name)}</button></th>'
        for i, name in enumerate(_HEADER)
    )
    rows = []
    for index, (record, layer) in enumerate(zip(facts.records, facts.layers, strict=True)):
        widths = (record.weight_bits, record.input_bits, record.output_bits)
        decibels = (layer.weights, layer.inputs, layer.outputs, layer.accumulated)
        alone = facts.sensitivity.get(record.name, math.inf)
        shape = "×".join(map(str, record.kernel_shape))
        counts = (record.macs, record.bytes_float, record.bytes_quantized)
        cells = [
            (str(index), record.name),
            (record.kind, record.kind),
            (str(math.prod(record.kernel_shape)), shape),
            (str(sum(width or 32 for width in widths)), record.widths),
            (record.activation, record.activation),
            *((_value(v), _db(v, "")) for v in (*decibels, alone)),
            *((str(v), f"{v:,}") for v in counts),
        ]
        text = "".join(
            f'<td{_css(i)} data-value="{escape(value)}">{escape(shown)}</td>'
            for i, (value, shown) in enumerate(cells)
        )
        rows.append(f"<tr>{text}</tr>")
    return (
        "<h2>Layers</h2>\n<p>Signal to noise in decibels; 6 dB is one bit. Weights, inputs and "
        "outputs: this tensor alone; a sequential fit moves weights further than rounding does, "
        "to make up for errors of their input. Network: the output after the activation with all "
        "layers before it quantized too. Alone: the logits with only this layer quantized. "
        "Click a heading to sort.</p>\n"
        f'<div class="scroll"><table id="layers"><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _matmuls(facts: Facts) -> str:
    """The products of two activations; nothing where none is quantized."""
    if not facts.matmuls:
        return ""
    header = ("product", "operands", "result", "bits a/b/y", "result dB", "MACs")
    rows = []
    for record in facts.matmuls:
        *operands, result = (product(shape) for shape in record.shapes)
        decibels = _db(math.inf if record.output_sqnr_db is None else record.output_sqnr_db, "")
        operands = " · ".join(operands)
        rows.append((record.name, operands, result, record.widths, decibels, record.macs))
    return (
        "<h2>Products of two activations</h2>\n<p>Signal to noise of the result in decibels, all "
        "that comes before it quantized too.</p>\n" + _plain_table("matmuls", header, rows)
    )


def _tables(facts: Facts) -> str:
    """The params that the input picks from; nothing where none is quantized."""
    if not facts.tables:
        return ""
    header = ("table", "shape", "bits", "dB", "bytes in float", "bytes")
    rows = [
        (
            *(record.name, product(record.shape), record.bits, _db(record.sqnr_db, "")),
            *(record.bytes_float, record.bytes_quantized),
        )
        for record in facts.tables
    ]
    return (
        "<h2>Tables</h2>\n<p>Params that the input picks from, as embeddings are; signal to noise "
        "of their values in decibels.</p>\n" + _plain_table("tables", header, rows)
    )


def _plain_table(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = (
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
        for cells in rows
    )
    return (
        f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _css(column: int) -> str:
    return ' class="text"' if column < _TEXT else ""


_COLOURS = {
    "weights": charts.BLUE,
    "inputs": charts.GREEN,
    "outputs": charts.PURPLE,
    "accumulated": charts.ORANGE,
}
_SERIES = {
    "weights": "weights",
    "inputs": "inputs",
    "outputs": "outputs",
    "accumulated": "outputs in the network",
}


def _quality(facts: Facts) -> str:
    names = [layer.name for layer in facts.layers]
    series = {css: [getattr(layer, css) for layer in facts.layers] for css in _SERIES}
    key = _key(_SERIES, _COLOURS)
    size = charts.rows_size(names)
    draw = partial(charts.dots, names=names, series=series, colours=_COLOURS)
    dots = charts.svg(draw, "signal to quantization noise of each layer in dB", size)
    noise = [100 * 10 ** (-facts.sensitivity.get(name, math.inf) / 20) for name in names]
    draw = partial(charts.bars, names=names, values=noise, unit="%")
    bars = charts.svg(draw, "error of the logits with one layer quantized", size)
    return (
        "<h2>Where the noise comes from</h2>\n"
        "<p>Left: signal to quantization noise per layer. Right: sensitivity, the root mean square "
        "error of the logits relative to the logits when only that layer is quantized.</p>\n"
        f'<div class="pair"><figure><figcaption>dB&ensp;{key}</figcaption>{dots}</figure>\n'
        f"<figure><figcaption>error of the logits, in percent</figcaption>{bars}</figure></div>"
    )


def _key(labels: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """What the colours of a chart stand for."""
    hues = {name: f"var({charts.VARIABLES[colour]})" for name, colour in colours.items()}
    return "".join(
        f'<span class="key" style="background: {hues[name]}"></span>{text}'
        for name, text in labels.items()
    )


def _details(facts: Facts) -> str:
    parts = []
    for index, (record, layer) in enumerate(zip(facts.records, facts.layers, strict=True)):
        charts = "\n".join(_histogram(name, h) for name, h in layer.histograms.items())
        is_open = " open" if index == 0 else ""
        parts.append(
            f"<details{is_open}><summary>{escape(record.name)} <span>{escape(record.kind)}, "
            f"{escape(record.activation)}</span></summary>\n"
            f'<div class="three">{charts}</div></details>'
        )
    return (
        "<h2>What was rounded</h2>\n<p>The values in the float network on calibration images, on a "
        "logarithmic scale, and the range that the codes cover; what lies outside is clipped. "
        "Weights are in units of their channel's range. Outputs are those after the activation."
        "</p>\n" + "\n".join(parts)
    )


def _histogram(name: str, h: Histogram) -> str:
    draw = partial(charts.histogram, counts=h.counts, low=h.low, high=h.high, clip=h.clip)
    chart = charts.svg(draw, f"histogram of the {name}")
    text = "in float" if h.clip is None else f"range {h.clip[0]:.4g} … {h.clip[1]:.4g}"
    return f"<figure><figcaption>{escape(name)}: {text}</figcaption>{chart}</figure>"


_READING = (
    "Each curve is a cost function over the share of the full range that is kept (errors as noise "
    "over signal, divergence in nats); its dot is what it chooses, absmax keeps all. The tables "
    "say what each choice does to the layer's output, all else in float."
)


def _curves(facts: Facts) -> str:
    return (
        f"<h2>How the ranges were found</h2>\n<p>The most sensitive layers. {_READING}</p>\n"
        f"{_charts(facts.curves)}"
    )


_DRAWN = [objective for objective in OBJECTIVES.values() if objective is not ABSMAX]
_HUES = itertools.cycle((charts.PURPLE, charts.BLUE, charts.ORANGE, charts.GREEN))
_OF_OBJECTIVE = {o.name: hue for o, hue in zip(_DRAWN, _HUES, strict=False)}


def _charts(layers: Mapping[str, Sequence[Curves]]) -> str:
    parts = []
    for name, tensors in layers.items():
        charts = "\n".join(_tensor_curves(curves) for curves in tensors)
        parts.append(f'<h3>{escape(name)}</h3>\n<div class="three">{charts}</div>')
    labels = {objective.name: objective.label for objective in _DRAWN}
    legend = f"<figure><figcaption>{_key(labels, _OF_OBJECTIVE)}</figcaption></figure>\n"
    return legend + "\n".join(parts)


def _tensor_curves(curves: Curves) -> str:
    points = {choice.method: min(choice.share, 1.0) for choice in curves.choices}
    points.pop(ABSMAX.name, None)
    chart = charts.svg(
        partial(
            charts.curves,
            x=curves.shares,
            lines=curves.losses,
            points=points,
            colours=_OF_OBJECTIVE,
        ),
        f"cost functions of the range of the {curves.tensor}",
    )
    rows = []
    for choice in curves.choices:
        css = ' class="best"' if choice is curves.best else ""
        rows.append(
            f"<tr{css}><td>{choice.method}</td><td>{choice.share:.1%}</td>"
            f"<td>{_db(choice.tensor_sqnr_db, '')}</td>"
            f"<td>{_db(choice.output_sqnr_db, '')}</td></tr>"
        )
    return (
        f"<figure><figcaption>{curves.tensor}, {curves.bits} bits</figcaption>{chart}\n"
        "<table><thead><tr><th>method</th><th>kept</th><th>tensor dB</th><th>output dB</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></figure>"
    )


def _predictions(facts: Facts) -> str:
    c = facts.comparison
    changed = c.images - int(np.trace(c.confusion))
    figures = []
    for index, (image, label) in zip(c.worst, facts.worst, strict=False):
        before, after = c.float_predictions[index], c.quantized_predictions[index]
        text = f"{before} → {after}" if before != after else f"{before}"
        css = ' class="changed"' if before != after else ""
        figures.append(
            f'<figure><img alt="test image {index}" src="{png_uri(image)}"><figcaption>'
            f"label {label}, predicted <span{css}>{text}</span><br>image {index}"
            "</figcaption></figure>"
        )
    return (
        f"<h2>Predictions</h2>\n<p>{changed:,} of {c.images:,} predictions changed. Rows: "
        "predicted by the float network; columns: by the quantized one.</p>\n"
        f"{_confusion(c.confusion)}\n"
        "<h2>Worst images</h2>\n<p>Those whose logits moved most, changed predictions first.</p>\n"
        f'<div class="images">{"".join(figures)}</div>\n'
        "<footer>Written by qjax. Everything on this page is in this file.</footer>"
    )


def _confusion(confusion: np.ndarray) -> str:
    classes = len(confusion)
    if classes > MAX_CLASSES:
        off = confusion - np.diag(np.diag(confusion))
        order = np.argsort(-off, axis=None, kind="stable")[:MAX_CLASSES]
        pairs = [np.unravel_index(i, off.shape) for i in order]
        rows = "".join(
            f"<tr><td>{a} → {b}</td><td>{off[a, b]}</td></tr>" for a, b in pairs if off[a, b]
        )
        body = f"<thead><tr><th>change</th><th>images</th></tr></thead><tbody>{rows}</tbody>"
    else:
        head = "".join(f"<th>{i}</th>" for i in range(classes))
        rows = "".join(
            f"<tr><th>{a}</th>{''.join(_cell(a, b, confusion[a, b]) for b in range(classes))}</tr>"
            for a in range(classes)
        )
        body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll"><table class="confusion">{body}</table></div>'


def _cell(before: int, after: int, count: int) -> str:
    css = "same" if before == after else "changed" if count else ""
    return f'<td class="{css}">{count or "·"}</td>'


# ---- Pieces


def _db(value: float, unit: str = " dB") -> str:
    return "∞" if value == math.inf else f"{value:.1f}{unit}"


def _value(value: float) -> str:
    """A number for sorting; infinity sorts last."""
    return "1e9" if value == math.inf else f"{value:.6g}"


def _span(interval: tuple[float, float], sign: str = "") -> str:
    return " … ".join(f"{value:{sign}.2f}" for value in interval)


def png_uri(image: np.ndarray) -> str:
    """Encodes an image as a `data:` URI of a PNG file.

    Args:
      image: [H, W, 1 or 3]; scaled to 0 … 255 by its largest value unless that is above 16 already.

    References:
      PNG specification, W3C 2003, sections 5 and 9: chunks, and filter type 0 before every row.
    """
    top = max(float(image.max()), 1.0)
    scale = 1.0 if top > 16 else 255 / top
    pixels = np.clip(np.rint(image * scale), 0, 255).astype(np.uint8)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    return f"data:image/png;base64,{base64.b64encode(png + chunk(b'IEND', b'')).decode()}"
