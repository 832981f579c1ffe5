"""The report page: everything is said, nothing is fetched, and a browser sorts its table."""

import base64
import dataclasses
import functools
import html.parser
import io
import re
from pathlib import Path

import attention
import browser
import numpy as np
import PIL.Image
import pytest
import small

import qjax
from qjax.page import quantization as page


@functools.cache
def facts() -> page.Facts:
    steps = []
    found = page.gather(
        small.quantized(bits=4),
        small.model(),
        small.images(),
        small.test_split(),
        (1000, 250),
        progress=lambda name, done, total: steps.append((done, total)),
    )
    assert steps == [(0, 2), (1, 2), (2, 2)]
    return found


@functools.cache
def document() -> str:
    return page.render(facts())


def test_the_page_says_what_was_measured():
    text = document()
    comparison = facts().comparison
    for shown in (
        f"{comparison.float_top1:.2f} %",
        f"{comparison.quantized_top1:.2f} %",
        f"{comparison.agreement:.2f} %",
        "4.00× smaller",
        "small &amp; &lt;sound&gt;, quantized",
        "weights 4 bits, inputs 4 bits, outputs 4 bits",
    ):
        assert shown in text
    assert text.count("<img") == page.WORST
    assert text.count("<details") == 2
    assert len(facts().curves) == 2 and text.count('class="curve output_mse"') == 2 * 3
    for layer in facts().layers:
        assert f">{layer.name}</td>" in text and f"{layer.weights:.1f}</td>" in text


def test_the_page_says_which_widths_the_layers_have():
    widths = [page._widths(bits) for bits in ([8, 8], [6, 2, 4], [None, 8], [None])]
    assert widths == ["8 bits", "2 to 6 bits", "8 bits or float", "float"]


def test_the_page_is_well_formed_and_fetches_nothing():
    open_tags = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)
            for name, value in attrs:
                assert name != "href" and (name != "src" or value.startswith("data:"))

        def handle_startendtag(self, tag, attrs):
            assert tag in ("g", "path", "use")

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Reader().feed(document())
    assert open_tags == []
    assert "{{" not in document()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", document())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("top", [16, 255])
def test_an_image_survives_as_png(channels: int, top: int):
    image = np.random.default_rng(0).integers(0, top + 1, (5, 7, channels), np.uint8)
    image[0, 0] = top
    head, _, data = page.png_uri(image).partition(",")
    assert head == "data:image/png;base64"
    decoded = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))).reshape(image.shape)
    np.testing.assert_array_equal(decoded, np.rint(image * (255 / top)))


def test_many_classes_are_listed_as_changes():
    classes = page.MAX_CLASSES + 1
    confusion = np.diag(np.full(classes, 9))
    confusion[3, 17] = 5
    changed = facts().comparison._replace(confusion=confusion)
    text = page.render(facts()._replace(comparison=changed))
    assert "<td>3 → 17</td><td>5</td>" in text and text.count("→") < 20


@pytest.mark.browser
def test_a_browser_sorts_the_table_on_a_laptop_and_on_a_phone(tmp_path: Path):
    chromium = browser.find()
    assert chromium is not None, "no Chromium on PATH: apt-get install chromium"
    path = tmp_path / "report.html"
    path.write_text(document())
    column = page._HEADER.index("weights dB")
    values = f"""[...document.querySelectorAll("#layers tbody tr")].map(
        row => Number(row.children[{column}].dataset.value))"""
    click = f"""document.querySelectorAll("#layers th button")[{column}].click()"""
    order = f"""document.querySelectorAll("#layers th")[{column}].getAttribute("aria-sort")"""
    shots = []
    with browser.browse(chromium, path, tmp_path / "profile") as window:
        unsorted = window.evaluate(values)
        for width, height in ((1280, 800), (390, 844)):
            for scheme in ("light", "dark"):
                window.show(width, height, scheme)
                window.evaluate(click)
                direction = window.evaluate(order)
                assert direction == ("ascending" if scheme == "light" else "descending")
                found = window.evaluate(values)
                assert found == sorted(unsorted, reverse=direction == "descending")
                wide = window.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, "nothing sticks out"
                shots.append(window.screenshot())
        assert window.requests == []
    images = [np.asarray(PIL.Image.open(io.BytesIO(shot)).convert("L")) for shot in shots]
    for image, (width, height), is_light in zip(
        images, [(1280, 800)] * 2 + [(390, 844)] * 2, [True, False] * 2, strict=True
    ):
        assert image.shape == (height, width)
        assert (np.median(image) > 200) if is_light else (np.median(image) < 60)
        assert image.std() > 10, "something is drawn"


def test_products_of_two_activations_have_a_table():
    network, x = attention.NETWORKS[4], attention.inputs(16)
    apply_fn, params = network.make()
    recipe = dataclasses.replace(small.CHEAP, matmuls="quantized")
    q = qjax.quantize(apply_fn, params, x, recipe)
    text = page.render(facts()._replace(matmuls=q.report.matmuls))
    table = text.split('<table id="matmuls">')[1].split("</table>")[0]
    for record in q.report.matmuls:
        assert f"<td>{record.name}</td><td>" in table and f"<td>{record.macs}</td>" in table
    assert "<td>8/8/8</td>" in table and '<table id="matmuls">' not in document()
