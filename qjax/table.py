"""A table as plain text: cells in columns, the header above them, sums below."""

import itertools
import os
from collections.abc import Iterator, Sequence

Cells = Sequence[str]

LEAST_NAME = 16  # characters of the first column that others make room for
LEAST_GROUPED = 32  # of one whose names are grouped: what is left of a name counts


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
      rows: the cells of each row.
      align: a character for every column: `<` to the left, `>` to the right.
      footer: one more row, set apart.
      ruled: whether lines are drawn below the header and above the footer.
      gap: blanks between two columns.
      widths: of the columns, where a longer cell sticks out; by default that of the longest cell.
      most: of all columns together. Where that is too little, names in the first one that are
        paths are grouped below the folders they share, and what is still too long is shortened.
      spared: headings of the columns that are left out, in this order, until the first one has
        `LEAST_NAME` characters of that, or `LEAST_GROUPED`.

    Returns:
      Lines without blanks at their ends, the last one without a line break.
    """
    lines = [header, *rows, *([footer] if footer else [])]
    lines = [[printable(cell) for cell in cells] for cells in lines]
    columns = list(widths) or [max(map(len, column)) for column in zip(*lines, strict=True)]
    if most is not None:
        least = LEAST_NAME
        if not widths and sum(columns) + gap * (len(columns) - 1) > most:
            below = grouped(lines[1 : 1 + len(rows)])
            least = LEAST_GROUPED if len(below) > len(rows) else LEAST_NAME
            lines[1 : 1 + len(rows)] = below
            columns[0] = max(len(name) for name, *cells in lines if not _is_folder(name, cells))
        kept = _fitting(lines[0], [min(columns[0], least), *columns[1:]], gap, most, spared)
        lines = [[cells[i] for i in kept] for cells in lines]
        align, columns = "".join(align[i] for i in kept), [columns[i] for i in kept]
        columns[0] = min(columns[0], most - sum(columns[1:]) - gap * (len(columns) - 1))
        lines = [
            (shortened(first, most if _is_folder(first, others) else columns[0]), *others)
            for first, *others in lines
        ]
    text = [_line(cells, align, columns, " " * gap) for cells in lines]
    if ruled:
        rule = "─" * len(text[0])
        text.insert(1, rule)
        if footer:
            text.insert(-1, rule)
    return "\n".join(text)


def grouped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Puts rows whose names are paths below the folder that they share with their neighbours.

    Examples:
      >>> for name, size in grouped([("stem", "9"), ("block/conv1", "3"), ("block/conv2", "4")]):
      ...     print(f"{name} {size}".rstrip())
      stem 9
      block/
        conv1 3
        conv2 4
    """
    return [[name, *cells] for name, cells in _grouped([(n.split("/"), c) for n, *c in rows], "")]


def _grouped(
    rows: Sequence[tuple[list[str], list[str]]], indent: str
) -> Iterator[tuple[str, list[str]]]:
    runs = itertools.groupby(rows, lambda row: row[0][0] if len(row[0]) > 1 else None)
    for folder, run in runs:
        members = list(run)
        if folder is None or len(members) == 1:
            yield from ((indent + "/".join(keys), cells) for keys, cells in members)
            continue
        shared = os.path.commonprefix([keys[:-1] for keys, _ in members])
        yield f"{indent}{'/'.join(shared)}/", ["" for _ in members[0][1]]
        inner = [(keys[len(shared) :], cells) for keys, cells in members]
        yield from _grouped(inner, indent + "  ")


def _is_folder(name: str, cells: Sequence[str]) -> bool:
    return name.endswith("/") and not any(cells)


def _fitting(
    header: Cells, columns: Sequence[int], gap: int, most: int, spared: Sequence[str]
) -> list[int]:
    """The positions of the columns that there is room for, the first of its least width."""
    kept = list(range(len(header)))
    for heading in spared:
        if columns[0] + sum(gap + columns[i] for i in kept[1:]) <= most:
            break
        kept.remove(header.index(heading))
    return kept


def printable(text: str) -> str:
    r"""A text whose control characters are spelled out: a name moves no cursor.

    Examples:
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
