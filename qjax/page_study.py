"""A study as a self-contained page: its table with a bar for every accuracy."""

from html import escape

from qjax.document import document
from qjax.studies import Row, Study


def render_study(study: Study, note: str) -> str:
    """Writes the page.

    Args:
      study: what was found.
      note: what the numbers are, plain text.

    Returns:
      One HTML document that loads nothing.
    """
    names = (*study.header, "top-1", "", "agreement", "logits dB", "bytes")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "\n".join(_row(row) for row in study.rows)
    labels = f"<td>float</td>{'<td></td>' * (len(study.header) - 1)}"
    reference = f"<tr>{labels}{_accuracy(study.float_top1)}<td>100.0</td><td></td><td></td></tr>"
    body = (
        f"<h1>{escape(study.question)}</h1>\n<p>{escape(note)}</p>\n"
        f'<div class="scroll"><table class="study"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n{reference}\n</tbody></table></div>"
    )
    return document(study.name, body)


def _row(row: Row) -> str:
    labels = "".join(f"<td>{escape(label)}</td>" for label in row.labels)
    numbers = (f"{row.agreement:.1f}", f"{row.logits_sqnr_db:.1f}", f"{row.bytes:,}")
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return f"<tr>{labels}{_accuracy(row.top1)}{cells}</tr>"


def _accuracy(top1: float) -> str:
    """The number, and a bar whose whole length is 100 %."""
    bar = f'<div class="part" style="width: {top1:.2f}%"></div>'
    return f'<td>{top1:.2f}</td><td class="whole"><div>{bar}</div></td>'
