"""Tables as plain text."""

import pytest

from qjax.table import grouped, shortened, table

HEADER = ("name", "size")
ROWS = [("stem", "9"), ("head", "1,024")]


def test_columns_are_as_wide_as_their_longest_cell():
    assert table(HEADER, ROWS, "<>", footer=("in all", "1,033")) == (
        "name     size\n─────────────\nstem        9\nhead    1,024\n─────────────\nin all  1,033"
    )


def test_given_widths_stay_and_longer_cells_stick_out():
    text = table(HEADER, ROWS, "<>", ruled=False, gap=1, widths=(3, 4))
    assert text.splitlines() == ["name size", "stem    9", "head 1,024"]


def test_lines_end_without_blanks():
    assert table(("name", ""), [("a", ""), ("b", "best")], "<<", ruled=False).splitlines() == [
        "name",
        "a",
        "b     best",
    ]


def test_the_first_column_is_shortened_to_what_is_left():
    lines = table(HEADER, [("layer1/block0/conv1", "9")], "<>", most=12).splitlines()
    assert lines == ["name    size", "─" * 12, "…conv1     9"]


@pytest.mark.parametrize(
    ("most", "cells"),
    [
        (40, ["layer1/block0/conv1", "conv", "9"]),
        (28, ["…r1/block0/conv1", "conv", "9"]),
        (24, ["…yer1/block0/conv1", "9"]),
        (16, ["…r1/block0/conv1"]),
    ],
)
def test_columns_give_way_to_the_first_one(most: int, cells: list[str]):
    header, row = ("name", "kind", "size"), ("layer1/block0/conv1", "conv", "9")
    lines = table(header, [row], "<<>", most=most, spared=header[1:]).splitlines()
    assert lines[-1].split() == cells and max(map(len, lines)) <= most


def test_a_row_has_a_cell_for_every_column():
    with pytest.raises(ValueError):
        table(HEADER, [("stem",)], "<>")


@pytest.mark.parametrize(
    ("text", "width", "expected"), [("head", 4, "head"), ("block/conv", 5, "…conv")]
)
def test_shortened_keeps_the_end(text: str, width: int, expected: str):
    assert shortened(text, width) == expected


LARGE = ("stem", *(f"features/stage{i}/block{j}/{name}" for i in range(4) for j in range(4)
         for name in ("expand", "depthwise", "project")), "head")  # fmt: skip


def test_paths_are_grouped_where_they_do_not_fit():
    rows = [(name, "depthwise_conv", "1,024") for name in LARGE]
    header, footer = ("layer", "kind", "size"), (f"{len(LARGE)} layers", "", "51,200")
    wide = table(header, rows, "<<>", footer=footer, most=80, spared=("kind",))
    assert wide == table(header, rows, "<<>", footer=footer)
    lines = table(header, rows, "<<>", footer=footer, most=40, spared=("kind",)).splitlines()
    assert lines[0].split() == ["layer", "kind", "size"]
    assert [line.split()[0] for line in lines[2:9]] == [
        *("stem", "features/", "stage0/", "block0/", "expand", "depthwise", "project"),
    ]
    assert lines[3:6] == ["features/", "  stage0/", "    block0/"]
    assert lines[6] == "      expand     depthwise_conv   1,024"
    assert lines[-1].split() == ["50", "layers", "51,200"]
    assert max(map(len, lines)) <= 40 and not any("…" in line for line in lines)
    assert sum("depthwise_conv" in line for line in lines) == len(LARGE)


def test_names_without_neighbours_in_their_folder_are_not_grouped():
    names = ["a/b/c/first", "d/e/f/second", "a/b/c/third"]
    assert [row[0] for row in grouped([(name, "") for name in names])] == names
