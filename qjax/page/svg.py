"""Small charts as SVG text, coloured by the classes of the page they stand in."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 10, 24
ROW = 20  # height of a row of `dots` and `bars`
CHART = 430  # their width
LABEL = 128  # width of their labels


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">\n'
        f"{body}\n</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def histogram(
    counts: Sequence[int], low: float, high: float, clip: tuple[float, float] | None, label: str
) -> str:
    """Draws counts in equal bins on a logarithmic scale, the clipping range marked.

    Args:
      counts: per bin.
      low: lower edge of the first bin.
      high: upper edge of the last bin.
      clip: the range to mark, None for none.
      label: what is drawn, for those who cannot see it.
    """
    first, last = (low, high) if clip is None else (min(low, clip[0]), max(high, clip[1]))
    span = last - first or 1.0
    plot = HEIGHT - TOP - BOTTOM
    tallest = math.log1p(max(max(counts), 1))

    def x_of(value: float) -> float:
        return LEFT + (value - first) / span * (WIDTH - LEFT - RIGHT)

    width = (high - low) / len(counts)
    base = HEIGHT - BOTTOM
    steps = [f"M{x_of(low):.1f} {base}"]
    for index, count in enumerate(counts):
        y = base - math.log1p(count) / tallest * plot
        left, right = x_of(low + index * width), x_of(low + (index + 1) * width)
        steps.append(f"L{left:.1f} {y:.1f}L{right:.1f} {y:.1f}")
    parts = [f'<path d="{"".join(steps)}L{x_of(high):.1f} {base}Z" class="bars"/>']
    if clip is not None:
        left, right = x_of(clip[0]), x_of(clip[1])
        parts += [_line(x, TOP - 6, x, base, "clip") for x in (left, right)]
    parts.append(_line(LEFT, base, WIDTH - RIGHT, base, "axis"))
    marks = {first: "start", last: "end"}
    if first < -0.12 * span and last > 0.12 * span:
        marks[0.0] = "middle"
    parts += [_text(x_of(v), HEIGHT - 8, f"{v:.3g}", anchor) for v, anchor in marks.items()]
    return _svg(WIDTH, HEIGHT, label, parts)


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    points: Mapping[str, tuple[float, str]],
    label: str,
) -> str:
    """Draws curves on a logarithmic scale over x from 0 to 1, with the chosen points on them.

    Args:
      x: where the curves are known.
      lines: heights by the css class of the curve.
      points: by name, the x of the choice and the css class of the curve it lies on.
      label: what is drawn, for those who cannot see it.
    """
    floor = 1e-9
    logs = {css: [math.log10(max(v, floor)) for v in values] for css, values in lines.items()}
    low = min(min(values) for values in logs.values())
    high = max(max(values) for values in logs.values())
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    left = 34

    def x_of(value: float) -> float:
        return left + value * (WIDTH - left - RIGHT)

    def y_of(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    every = max(1, math.ceil((high - low) / 5))
    for decade in range(low, high + 1, every):
        parts.append(_line(left, y_of(decade), WIDTH - RIGHT, y_of(decade), "grid"))
        parts.append(_text(left - 4, y_of(decade) + 3, f"1e{decade}", "end"))
    for mark in (0.0, 0.5, 1.0):
        anchor = {0.0: "start", 1.0: "end"}.get(mark, "middle")
        parts.append(_text(x_of(mark), HEIGHT - 8, f"{mark:g}", anchor))
    for css, values in logs.items():
        path = "L".join(f"{x_of(a):.1f} {y_of(v):.1f}" for a, v in zip(x, values, strict=True))
        parts.append(f'<path d="M{path}" class="curve {css}"/>')
    for name, (at, css) in points.items():
        if css in logs:
            nearest = min(range(len(x)), key=lambda i: abs(x[i] - at))
            cx, cy = x_of(x[nearest]), y_of(logs[css][nearest])
            parts.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4.5" class="point {css}">'
                f"<title>{escape(name)}: {at:.2f}</title></circle>"
            )
        else:
            parts.append(_line(x_of(at), TOP, x_of(at), HEIGHT - BOTTOM, f"mark {css}"))
    return _svg(WIDTH, HEIGHT, label, parts)


def _rows(names: Sequence[str], ticks: Sequence[tuple[float, str]]) -> list[str]:
    """The labels of rows, and the vertical grid under them."""
    height = ROW * len(names)
    parts = []
    for x, text in ticks:
        parts += [_line(x, 0, x, height, "grid"), _text(x, height + 14, text)]
    for index, name in enumerate(names):
        y = ROW * index + ROW / 2
        shown = name if len(name) <= 20 else f"…{name[-19:]}"
        parts.append(_text(LABEL - 8, y + 4, shown, "end", "name"))
        parts.append(_line(LABEL, y, CHART - 16, y, "grid"))
    return parts


def dots(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> str:
    """Draws a row per name with one dot per series; values that are not finite are left out.

    Args:
      names: of the rows.
      series: by css class, a value per row.
      label: what is drawn, for those who cannot see it.
    """
    values = [v for column in series.values() for v in column if math.isfinite(v)] or [0.0, 1.0]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    high = max(high, low + 10)

    def x_of(value: float) -> float:
        return LABEL + (value - low) / (high - low) * (CHART - LABEL - 16)

    ticks = [(x_of(v), f"{v}") for v in range(low, high + 1, 10)]
    parts = _rows(names, ticks)
    for css, column in series.items():
        for index, value in enumerate(column):
            if math.isfinite(value):
                title = f"<title>{escape(names[index])}: {value:.1f} dB</title>"
                parts.append(
                    f'<circle cx="{x_of(value):.1f}" cy="{ROW * index + ROW / 2:.1f}" r="4.5" '
                    f'class="dot {css}">{title}</circle>'
                )
    return _svg(CHART, ROW * len(names) + 20, label, parts)


def bars(names: Sequence[str], values: Sequence[float], unit: str, label: str) -> str:
    """Draws a horizontal bar per name, its value written after it.

    Args:
      names: of the rows.
      values: not negative.
      unit: written after each value.
      label: what is drawn, for those who cannot see it.
    """
    longest = max([*values, 1e-12])
    room = CHART - LABEL - 64
    parts = _rows(names, [])
    for index, value in enumerate(values):
        length = value / longest * room
        y = ROW * index + 4
        parts.append(
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{ROW - 8}" rx="3" '
            'class="bar"/>'
        )
        parts.append(_text(LABEL + length + 6, y + 10, f"{value:.3g} {unit}", "start"))
    return _svg(CHART, ROW * len(names) + 4, label, parts)
