"""Tables of accuracy as text: the page of each, and what README and docs/results.md show."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_measuring import FLOAT, HELD_OUT
from accuracy_tables import UNIFORM, Table

from qjax.atomic import write

LONG = """medians over the layers of the SQNR of kernels and outputs, and
of what outputs have more than with uniform weights of that width; top-1 in percent on all test
images; bytes of kernels, with scales and tables, and of biases; and the error"""
ERRORS = {
    "error": "|f(x) − f̂(x)|² / |f(x)|² of the logits",
    "plain": "KL(softmax(f(x)) ‖ softmax(f̂(x))) in nats",
}


def document(table: Table, lines: Sequence[dict[str, Any]], command: str) -> str:
    """The table as a page."""
    calibrated = [line for line in lines if line["row"] != FLOAT]
    images = sorted({line["calibration_images"] for line in calibrated})
    *first, last = (f"{n:,}" for n in images)
    counts = f"{', '.join(first)} or {last}" if first else last
    shown = (
        LONG if table.is_long else "top-1 in percent on all test images, and in brackets the error"
    )
    return f"""# {table.title}

Measured by `{command}`: {shown}
{ERRORS[table.error]} on up to {HELD_OUT:,} training images not calibrated on.
{counts} calibration images; means over the draws.{_agreement(lines)}

{rows_of_markdown(table, lines, with_error=True)}
"""


def _agreement(lines: Sequence[dict[str, Any]]) -> str:
    """Says for how many images integers and fake quantization give other logits."""
    counted = [line for line in lines if "other_logits" in line]
    if not counted:
        return ""
    images, others = (sum(line[key] for line in counted) for key in ("test_images", "other_logits"))
    return (
        f" In {len(counted)} networks on integers {others:,} of {images:,} images have other "
        "logits than by fake quantization."
    )


def rows_of_markdown(table: Table, lines: Sequence[dict[str, Any]], with_error: bool) -> str:
    """The table, all models in one."""
    columns = table.columns
    if table.is_long:
        return long_rows(table, lines)
    text = [
        f"| | float | draws | | {' | '.join(columns)} |",
        f"|---|---|---|---|{'---|' * len(columns)}",
    ]
    error = table.error if with_error else None
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == model]
        reference = next(line["top1"] for line in mine if line["row"] == FLOAT)
        draws = len({line["seed"] for line in mine if line["row"] != FLOAT})
        head = f"{model} | {reference:.2f} | {draws}"
        for row in table.rows:
            cells = [cell(mine, row, column, error) for column in columns]
            if any(cells):
                text.append(f"| {head} | {row} | {' | '.join(cells)} |")
                head = " | | "
    return "\n".join(text)


def long_rows(table: Table, lines: Sequence[dict[str, Any]]) -> str:
    """A line for each row of each column, decibels as medians over the layers.

    The gain is the median over the layers of what the output has more than with uniform weights.
    """
    text = [
        "| | float | | | weights dB | output dB | gain dB | top-1 | logits' error | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = {(line["row"], line["column"]): line for line in lines if line["model"] == model}
        head = f"{model} | {mine[FLOAT, FLOAT]['top1']:.2f}"
        for column in sorted(table.columns, reverse=True):
            label = column
            for row in table.rows:
                if (line := mine.get((row, column))) is None:
                    continue
                pairs = zip(line["output_db"], mine[UNIFORM, column]["output_db"], strict=True)
                gains = [ours - theirs for ours, theirs in pairs]
                weights_db, output_db, gain = map(
                    statistics.median, (line["weight_db"], line["output_db"], gains)
                )
                text.append(
                    f"| {head} | {label} | {row} | {weights_db:.1f} | {output_db:.1f} | {gain:+.1f}"
                    f" | {line['top1']:.2f} | {line['error']:.1e} | {line['bytes']:,} |"
                )
                head, label = " | ", ""
    return "\n".join(text)


def cell(lines: Sequence[dict[str, Any]], row: str, column: str, error: str | None) -> str:
    """Means over the draws; in brackets those of a field of the measurements, if one is named.

    A cell that lacks some of the draws says how many it has.
    """
    found = [line for line in lines if (line["row"], line["column"]) == (row, column)]
    if not found:
        return ""
    if found[0]["top1"] is None:
        return "–"
    text = f"{statistics.mean(line['top1'] for line in found):.2f}"
    if error is not None:
        text += f" ({statistics.mean(line[error] for line in found):.1e})"
    draws = len({line["seed"] for line in lines if line["row"] != FLOAT})
    return text if len(found) == draws else f"{text}, {len(found)} of {draws} draws"


def show(page: Path, name: str, text: str) -> None:
    """Replaces what stands on a page between the marks of a table, where it has them."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, mark, rest = page.read_text(encoding="utf-8").partition(start)
    if mark:
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"{page} has {start.strip()} but not {end} after it.")
        write(page, f"{before}{start}\n{text}\n\n{end}{after}")
