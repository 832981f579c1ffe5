"""Charts by matplotlib: on axes for a notebook, or as SVG text in the colours of a page.

A drawing is a function of axes. `svg` gives it axes of its own and writes what it drew as an
element of HTML whose colours are CSS variables, so that one chart serves light and dark pages.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

# Colours by the name of the page's CSS variable, as they are on light paper.
INK, MUTED, GRID, PAPER = "#1d2330", "#667085", "#ebe9e2", "#ffffff"
FILL, BLUE, ORANGE, GREEN, PURPLE = "#b9c6e8", "#2456c9", "#d9541e", "#16876b", "#9b3fb5"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--card",
    FILL: "--fill",
    BLUE: "--a",
    ORANGE: "--b",
    GREEN: "--c",
    PURPLE: "--d",
}
SMALL = (320.0, 170.0)  # width and height of a chart among three, in pixels
WIDE = 430.0  # width of a chart among two
ROW = 20.0  # height of a row of `dots` and `bars`

Drawing = Callable[[Any], None]  # of matplotlib.axes.Axes


def inches(size: tuple[float, float]) -> tuple[float, float]:
    """Width and height in inches of a figure of so many pixels, as matplotlib writes SVG."""
    return size[0] / 72, size[1] / 72


def require() -> None:
    """Raises `ImportError` if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'charts need the package matplotlib; install it with `pip install "qjax[all]"`.'
        ) from error


def svg(draw: Drawing, label: str, size: tuple[float, float] = SMALL) -> str:
    """Draws a chart as an element of HTML.

    Args:
      draw: takes the axes to draw on.
      label: says what is drawn, for those who cannot see it.
      size: width and height in pixels, on a page that is wide enough.

    Returns:
      One `svg` element that refers to nothing outside of it.

    Raises:
      ImportError: if there is no matplotlib.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "qjax", "font.size": 11}
    file = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(inches(size), layout="constrained")
        draw(figure.add_subplot())
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
    return _element(file.getvalue(), label)


def _element(text: str, label: str) -> str:
    """A file of matplotlib's as an element of a page, which may hold several."""
    text = text[text.index("<svg") :]
    _, _, body = text.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    body = re.sub(r"<g id=", "<g class=", body)  # ids are unique in a page, classes need not be
    body = re.sub(r"font(-family)?: [^;\"]*;?", "", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg {view_box[0]} role="img" aria-label="{escape(label)}">{body.strip()}'


def _bare(axes: Any, *sides: str) -> None:
    """Leaves of the frame only some sides, and of the ticks only their labels."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)
        spine.set_color(MUTED)
    axes.tick_params(length=0, labelcolor=MUTED)


def histogram(
    axes: Any,
    counts: Sequence[int],
    low: float,
    high: float,
    clip: tuple[float, float] | None = None,
) -> None:
    """Draws counts in equal bins on a logarithmic scale, with the clipping range marked.

    Args:
      axes: of matplotlib.
      counts: per bin.
      low: lower edge of the first bin.
      high: upper edge of the last bin.
      clip: the range to mark, None for none.
    """
    edges = np.linspace(low, high, len(counts) + 1)
    axes.stairs(np.log1p(counts), edges, fill=True, color=FILL, clip_on=False)
    first, last = (low, high) if clip is None else (min(low, clip[0]), max(high, clip[1]))
    for edge in clip or ():
        axes.axvline(edge, color=ORANGE, linewidth=2, clip_on=False)
    span = last - first or 1.0
    ticks = [first, *([0.0] if first < -0.12 * span and last > 0.12 * span else []), last]
    axes.set_xlim(first, first + span)
    axes.set_ylim(0)
    axes.set_yticks([])
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    _bare(axes, "bottom")


def curves(
    axes: Any,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    points: Mapping[str, float],
    colours: Mapping[str, str],
) -> None:
    """Draws curves on a logarithmic scale over x from 0 to 1, with the chosen points on them.

    Args:
      axes: of matplotlib.
      x: where the curves are known.
      lines: heights, by name.
      points: x of what is chosen, by name; a vertical line where there is no curve of that name.
      colours: by name.
    """
    heights = {name: np.maximum(values, 1e-9) for name, values in lines.items()}
    for name, values in heights.items():
        (line,) = axes.plot(x, values, color=colours[name], linewidth=2, clip_on=False)
        line.set_gid(f"curve {name}")
    for name, at in points.items():
        if name in heights:
            nearest = int(np.argmin(np.abs(np.asarray(x) - at)))
            place = ([x[nearest]], [heights[name][nearest]])
            axes.plot(*place, "o", color=colours[name], clip_on=False, markeredgecolor=PAPER, ms=9)
        else:
            axes.axvline(at, color=colours[name], linestyle="--", linewidth=1.5, clip_on=False)
    axes.set_yscale("log")
    low = math.floor(math.log10(min(values.min() for values in heights.values())))
    high = math.ceil(math.log10(max(values.max() for values in heights.values())))
    high = max(high, low + 1)
    axes.set_ylim(10.0**low, 10.0**high)
    decades = range(low, high + 1, max(1, math.ceil((high - low) / 5)))
    axes.set_yticks([10.0**d for d in decades], [f"1e{d}" for d in decades])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color=GRID, clip_on=False)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    _bare(axes)


def _rows(axes: Any, names: Sequence[str]) -> None:
    """A row per name, the first one on top."""
    shown = [name if len(name) <= 20 else f"…{name[-19:]}" for name in names]
    axes.set_yticks(range(len(names)), shown)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", color=GRID, clip_on=False)
    axes.set_axisbelow(True)
    _bare(axes)
    axes.tick_params(axis="y", labelcolor=INK)


def rows_size(names: Sequence[str]) -> tuple[float, float]:
    """Width and height in pixels of a chart with a row per name."""
    return WIDE, ROW * len(names) + 28


def dots(
    axes: Any,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
) -> None:
    """Draws a row per name with a dot per series; values that are not finite are left out.

    Args:
      axes: of matplotlib.
      names: of the rows.
      series: a value per row, by the name of the series.
      colours: by the name of the series.
    """
    _rows(axes, names)
    for name, column in series.items():
        finite = [(value, row) for row, value in enumerate(column) if math.isfinite(value)]
        style = {"color": colours[name], "markeredgecolor": PAPER, "ms": 9, "clip_on": False}
        axes.plot(*zip(*finite, strict=True) if finite else ((), ()), "o", label=name, **style)
    axes.grid(axis="x", color=GRID, clip_on=False)


def bars(axes: Any, names: Sequence[str], values: Sequence[float], unit: str) -> None:
    """Draws a horizontal bar per name, its value written after it.

    Args:
      axes: of matplotlib.
      names: of the rows.
      values: not negative.
      unit: written after each value.
    """
    _rows(axes, names)
    drawn = axes.barh(range(len(names)), values, height=0.6, color=BLUE, clip_on=False)
    texts = [f"{value:.3g} {unit}" for value in values]
    axes.bar_label(drawn, texts, padding=5, color=MUTED, clip_on=False)
    axes.set_xlim(0, 1.25 * max([*values, 1e-12]))
    axes.set_xticks([])
