"""A study as a self-contained page: its table with a bar for every accuracy."""

from collections.abc import Sequence
from html import escape

from qjax.page.document import document
from qjax.study.questions import Study, cells


def render_study(study: Study, note: str) -> str:
    """Writes the page.

    Args:
      study: what was found.
      note: what the numbers are, plain text.

    Returns:
      One HTML document that loads nothing.
    """
    head, *rows = cells(study.header, study.rows, study.float_top1)
    top1 = len(study.header)  # the column behind the labels
    lines = "\n".join(_line("td", row, top1, _bar(row[top1])) for row in rows)
    body = (
        f"<h1>{escape(study.question)}</h1>\n<p>{escape(note)}</p>\n"
        f'<div class="scroll"><table class="study"><thead>{_line("th", head, top1, "")}</thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
    return document(study.name, body)


def _line(tag: str, texts: Sequence[str], top1: int, bar: str) -> str:
    """A row of the table, the bar behind the column `top1`."""
    found = [f"<{tag}>{escape(text)}</{tag}>" for text in texts]
    found.insert(top1 + 1, f'<{tag} class="whole">{bar}</{tag}>')
    return f"<tr>{''.join(found)}</tr>"


def _bar(percent: str) -> str:
    """A bar whose whole length is 100 %."""
    return f'<div><div class="part" style="width: {percent}%"></div></div>'
