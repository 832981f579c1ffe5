"""The examples in the documentation print what stands there."""

import doctest
import pathlib
import re
import runpy
from typing import Any

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
ALL = {page.stem: page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
TUTORIALS = {page.stem: page for page in sorted(DOCS.glob("tutorials/*.py"))}
PAGES = {name: page for name, page in ALL.items() if ">>> " in page.read_text("utf-8")}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IN_RUNTIMES = ("openvino", "ai_edge_litert", "iree.", "litert")  # tests/runtimes runs these
MOST_LINES = 120  # of README


def plain_blocks(page: pathlib.Path) -> list[str]:
    """The Python blocks of a page without prompts, but for those of other runtimes."""
    blocks = BLOCK.findall(page.read_text("utf-8"))
    plain = (block for block in blocks if ">>> " not in block)
    return [block for block in plain if not any(name in block for name in IN_RUNTIMES)]


PLAIN = [name for name, page in ALL.items() if plain_blocks(page)]


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


@pytest.mark.parametrize("name", PLAIN)
def test_blocks_without_output_run(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with jax.numpy_rank_promotion("allow"):  # as it is for readers
        for block in plain_blocks(ALL[name]):
            exec(compile(block, str(ALL[name]), "exec"), names)


@pytest.mark.usefixtures("optimized")  # fitting takes longer than compiling
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_finds_what_it_tells(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        names = runpy.run_path(str(TUTORIALS[name]))
    TOLD[name](names)


def _network_from_float_to_onnx(names: dict[str, Any]) -> None:
    assert names["in_float"] > 97
    assert names["with_8_bits"] > names["in_float"] - 0.5
    assert names["with_4_bits"] > names["in_float"] - 2
    assert names["same"] and names["in_onnx"] == pytest.approx(names["with_8_bits"])


def _reading_a_report(names: dict[str, Any]) -> None:
    assert names["with_3_bits"] <= names["in_float"]  # of 500 images
    assert [record.weight_bits for record in names["q"].report] == [3] * 20


TOLD = {"flax_cnn": _network_from_float_to_onnx, "reading_a_report": _reading_a_report}


def test_every_tutorial_is_told():
    assert set(TOLD) == set(TUTORIALS)


def test_readme_is_short_and_its_blocks_run():
    assert "README" in PLAIN
    assert len(ALL["README"].read_text("utf-8").splitlines()) <= MOST_LINES
