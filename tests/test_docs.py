"""The examples in the documentation print what stands there."""

import doctest
import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = {page.stem: page for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text("utf-8")}


def test_a_page_has_examples():
    assert "worked-examples" in PAGES


@pytest.mark.parametrize("name", PAGES)
def test_examples_print_what_the_page_says(name: str):
    fences = re.compile(r"^```.*$", re.MULTILINE)  # else the closing one is taken for output
    text = fences.sub("", PAGES[name].read_text("utf-8"))
    example = doctest.DocTestParser().get_doctest(text, {}, name, str(PAGES[name]), 0)
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    with jax.numpy_rank_promotion("allow"):  # as it is for readers; Keras needs it
        failed, attempted = runner.run(example, out=printed.append)
    assert attempted and not failed, "".join(printed)
