"""A table as plain text: cells in columns, the header above them, sums below."""

from collections.abc import Sequence

Cells = Sequence[str]

LEAST_NAME = 16  # characters of the first column that others make room for


def table(
    header: Cells,
    rows: Sequence[Cells],
    align: str,
    *,
    footer: Cells = (),
    ruled: bool = True,
    gap: int = 2,
    widths: Sequence[int] = (),
    most: int | None = None,
    spared: Sequence[str] = (),
) -> str:
    """Writes a table.

    Args:
      header: a cell for every column.
      rows: likewise, each.
      align: a character for every column: `<` to the left, `>` to the right.
      footer: one more row, set apart.
      ruled: whether lines are drawn below the header and above the footer.
      gap: blanks between two columns.
      widths: of the columns, where a longer cell sticks out; by default that of the longest cell.
      most: of all columns together; the first one is shortened to that.
      spared: headings of the columns that are left out, in this order, until the first one has
        `LEAST_NAME` characters of that.

    Returns:
      Lines without blanks at their ends, the last one without a line break.
    """
    lines = [header, *rows, *([footer] if footer else [])]
    lines = [[printable(cell) for cell in cells] for cells in lines]
    columns = list(widths) or [max(map(len, column)) for column in zip(*lines, strict=True)]
    if most is not None:
        kept = _fitting(lines[0], columns, gap, most, spared)
        lines = [[cells[i] for i in kept] for cells in lines]
        align, columns = "".join(align[i] for i in kept), [columns[i] for i in kept]
        columns[0] = min(columns[0], most - sum(columns[1:]) - gap * (len(columns) - 1))
        lines = [(shortened(first, columns[0]), *others) for first, *others in lines]
    text = [_line(cells, align, columns, " " * gap) for cells in lines]
    if ruled:
        rule = "─" * len(text[0])
        text.insert(1, rule)
        if footer:
            text.insert(-1, rule)
    return "\n".join(text)


def _fitting(
    header: Cells, columns: Sequence[int], gap: int, most: int, spared: Sequence[str]
) -> list[int]:
    """The positions of the columns that there is room for."""
    kept = list(range(len(header)))
    for heading in spared:
        least = min(columns[0], LEAST_NAME) + sum(gap + columns[i] for i in kept[1:])
        if least <= most:
            break
        kept.remove(header.index(heading))
    return kept


def printable(text: str) -> str:
    r"""A text whose control characters are spelled out: a name moves no cursor.

    Example:
      >>> print(printable(f"clear{chr(27)}[2J"))
      clear\x1b[2J
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def shortened(text: str, width: int) -> str:
    """The end of a text where all of it is too long: the start of a layer's name says least."""
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _line(cells: Cells, align: str, widths: Sequence[int], gap: str) -> str:
    parts = [
        cell.rjust(width) if side == ">" else cell.ljust(width)
        for cell, side, width in zip(cells, align, widths, strict=True)
    ]
    return gap.join(parts).rstrip()
