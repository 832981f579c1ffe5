"""A study as a self-contained page: its table with a bar for every accuracy."""

from collections.abc import Callable, Sequence
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
    return render_table(study.name, study.question, note, head, rows, [len(study.header)])


def render_table(
    name: str,
    question: str,
    note: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    accuracies: Sequence[int],
) -> str:
    """Writes a page of one table.

    Args:
      name: its title.
      question: its heading.
      note: what the numbers are, plain text.
      header: a cell for every column.
      rows: as many cells each.
      accuracies: the columns that start with a percentage, which a bar follows.

    Returns:
      One HTML document that loads nothing.
    """
    lines = "\n".join(_line("td", row, accuracies, _bar) for row in rows)
    body = (
        f"<h1>{escape(question)}</h1>\n<p>{escape(note)}</p>\n"
        '<div class="scroll"><table class="study"><thead>'
        f"{_line('th', header, accuracies, lambda text: '')}</thead>\n"
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
    return document(name, body)


def _line(
    tag: str, texts: Sequence[str], accuracies: Sequence[int], bar: Callable[[str], str]
) -> str:
    """A row of the table, a bar after every accuracy."""
    found = []
    for column, text in enumerate(texts):
        found.append(f"<{tag}>{escape(text)}</{tag}>")
        if column in accuracies:
            found.append(f'<{tag} class="whole">{bar(text)}</{tag}>')
    return f"<tr>{''.join(found)}</tr>"


def _bar(text: str) -> str:
    """A bar whose whole length is 100 %, for a text that starts with a percentage."""
    percent = text.partition(" ")[0] or 0
    return f'<div><div class="part" style="width: {percent}%"></div></div>'
