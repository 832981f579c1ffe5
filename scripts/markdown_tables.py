"""Tables in the pages of docs/."""

from collections.abc import Iterable, Sequence

_RULES = {"<": "---", ">": "---:"}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Writes a table in Markdown.

    Args:
      header: the columns' names.
      rows: as many cells each.
      align: "<" or ">" for each column.
    """
    rules = [_RULES[side] for side in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))
