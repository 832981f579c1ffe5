"""Charts: what is drawn, in whose colours, and what is said where nothing can draw."""

import re
import sys
from functools import partial

import numpy as np
import pytest
from matplotlib.figure import Figure

from qjax import charts

DRAWINGS = {
    "histogram": partial(charts.histogram, counts=[1, 5, 2], low=-1.0, high=2.0, clip=(-0.5, 3.0)),
    "curves": partial(
        charts.curves,
        x=[0.1, 0.5, 1.0],
        lines={"mse": [1.0, 0.01, 0.1]},
        points={"mse": 0.5, "percentile": 0.9},
        colours={"mse": charts.BLUE, "percentile": charts.PURPLE},
    ),
    "dots": partial(
        charts.dots,
        names=["stem", "a/very/long/path/to/a/layer"],
        series={"weights": [30.0, np.inf], "outputs": [20.0, 25.0]},
        colours={"weights": charts.BLUE, "outputs": charts.ORANGE},
    ),
    "bars": partial(charts.bars, names=["stem", "head"], values=[0.0, 2.5], unit="%"),
}


def axes():
    return Figure().add_subplot()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_chart_has_the_colours_of_its_page_and_stands_alone(name: str):
    text = charts.svg(DRAWINGS[name], "what it <says>")
    assert text.startswith('<svg viewBox="0 0 320 170"') and text.endswith("</svg>")
    assert 'aria-label="what it &lt;says&gt;"' in text
    hues = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert not hues, "every colour is a variable of the page"
    assert "var(--" in text and "font-family" not in text
    assert not re.search(r"https?:|url\(|id=\"\w+_\d", text)


def test_a_histogram_reaches_as_far_as_its_clipping_range():
    drawn = axes()
    DRAWINGS["histogram"](drawn)
    assert drawn.get_xlim() == (-1.0, 3.0)
    assert [label.get_text() for label in drawn.get_xticklabels()] == ["-1", "0", "3"]
    heights = drawn.patches[0].get_data().values
    np.testing.assert_allclose(heights, np.log1p([1, 5, 2]))


def test_curves_mark_what_was_chosen():
    drawn = axes()
    DRAWINGS["curves"](drawn)
    curve, dot, line = drawn.lines
    assert list(curve.get_ydata()) == [1.0, 0.01, 0.1]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([0.5], [0.01])
    assert list(line.get_xdata()) == [0.9, 0.9]


def test_dots_leave_out_what_is_not_finite_and_shorten_names():
    drawn = axes()
    DRAWINGS["dots"](drawn)
    weights, outputs = drawn.lines
    assert (list(weights.get_xdata()), list(weights.get_ydata())) == ([30.0], [0])
    assert (list(outputs.get_xdata()), list(outputs.get_ydata())) == ([20.0, 25.0], [0, 1])
    names = [label.get_text() for label in drawn.get_yticklabels()]
    assert names[0] == "stem" and names[1] == "…" + "a/very/long/path/to/a/layer"[-19:]


def test_bars_carry_their_values():
    drawn = axes()
    DRAWINGS["bars"](drawn)
    assert [bar.get_width() for bar in drawn.patches] == [0.0, 2.5]
    assert [text.get_text() for text in drawn.texts] == ["0 %", "2.5 %"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "qjax\[all\]"'):
        charts.svg(DRAWINGS["bars"], "")
