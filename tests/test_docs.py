"""The examples in the documentation print what stands there."""

import doctest
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
ALL = {page.stem: page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
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


def test_readme_is_short_and_its_blocks_run():
    assert "README" in PLAIN
    assert len(ALL["README"].read_text("utf-8").splitlines()) <= MOST_LINES
