"""The study of the embedded model: the committed document is what a fresh run writes.

Text must be the same to the letter. Numbers may differ between machines, since sums of float32 are
taken in other orders and a code may round the other way: by 2 percent, or 5 units of the last place
that is written, whichever is more; that is 0.5 dB and, at 500 images, 10 predictions. At 2 bits the
network is mostly wrong and small causes change many predictions: there by 10 points.
"""

import functools
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHAOTIC = ("| 2 | weights", "| 2 | activations", "Top-1 points lost")  # starts of lines
NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def disagreements(committed: str, fresh: str) -> list[str]:
    """Where two documents disagree, as pairs of what they say."""
    found = []
    lines, others = committed.splitlines(), fresh.splitlines()
    if len(lines) != len(others):
        found.append(f"{len(lines)} lines, {len(others)} lines")
    for line, other in zip(lines, others, strict=False):
        if NUMBER.split(line) != NUMBER.split(other):
            found.append(f"{line}\n{other}")
            continue
        for a, b in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
            x, y = (float(text.replace("−", "-")) for text in (a, b))
            mantissa, _, exponent = a.partition("e")
            places = len(mantissa.partition(".")[2])
            unit = 10.0 ** (int(exponent or 0) - places)
            slack = 10.0 if line.startswith(CHAOTIC) else 5.001 * unit
            if abs(x - y) > max(0.02 * abs(x), slack):
                found.append(f"{a} and {b} in: {line}")
    return found


sys.path.append(str(ROOT / "scripts"))
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "study.py"))
SECTIONS = {section.__name__.strip("_"): section for section in SCRIPT["SECTIONS"]}


@functools.cache
def subject() -> Any:
    return SCRIPT["Subject"]("resnet20-digits", 256, True, None)


def committed() -> dict[str, str]:
    """The document by section: all but the first begin with a heading."""
    text = (ROOT / "docs" / "study-digits.md").read_text()
    assert text.endswith("\n")
    return dict(zip(SECTIONS, re.split(r"\n\n(?=## )", text[:-1]), strict=True))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_committed_document_is_what_a_fresh_run_writes(section: str):
    assert disagreements(committed()[section], SECTIONS[section](subject())) == []


@pytest.mark.parametrize(
    ("committed", "fresh", "count"),
    [
        ("99.80 % and 37.4 dB", "99.40 % and 37.9 dB", 0),
        ("99.80 % of", "97.00 % of", 1),
        ("37.4 dB", "38.3 dB", 1),
        ("scale 0.00112", "scale 0.00119", 1),
        ("scale 1.12e-05", "scale 1.25e-05", 1),
        ("37.4 dB", "37.4 db", 1),
        ("one", "one\ntwo", 1),
        ("| 2 | weights | 31.80 |", "| 2 | weights | 38.20 |", 0),
        ("| 2 | weights | 31.80 |", "| 2 | weights | 45.20 |", 1),
        ("| 2 | input codes | 31.80 |", "| 2 | input codes | 38.20 |", 1),
    ],
)
def test_disagreements_are_found(committed: str, fresh: str, count: int):
    assert len(disagreements(committed, fresh)) == count
