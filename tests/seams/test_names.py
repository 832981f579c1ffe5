"""A method is a value in a table: nothing outside of its table's modules asks for it by name."""

import ast
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from qjax.formats.spec import FORMATS
from qjax.graph.activation import ACTIVATIONS
from qjax.integer.accumulator import CHECKS, OVERFLOWS
from qjax.integer.lowerings import LOWERINGS
from qjax.integer.requantize import ARITHMETICS
from qjax.objectives.table import OBJECTIVES
from qjax.rounding.table import ROUNDINGS

PACKAGE = pathlib.Path(__file__).parents[2] / "qjax"


class Table(NamedTuple):
    """A table of methods.

    Attributes:
      name: of the table.
      methods: what it holds, by name.
      home: the folder or the module that may compare with the names.
      others: names of methods that no recipe can give.
    """

    name: str
    methods: Mapping[str, Any]
    home: str
    others: tuple[str, ...] = ()


TABLES = (
    Table("FORMATS", FORMATS, "formats"),
    Table("OBJECTIVES", OBJECTIVES, "objectives", ("probabilities",)),
    Table("ROUNDINGS", ROUNDINGS, "rounding"),
    Table("ACTIVATIONS", ACTIVATIONS, "graph/activation.py", ("other",)),
    Table("ARITHMETICS", ARITHMETICS, "integer/requantize.py"),
    Table("LOWERINGS", LOWERINGS, "integer/lowerings.py"),
    Table("OVERFLOWS", OVERFLOWS, "integer/accumulator.py"),
    Table("CHECKS", CHECKS, "integer/accumulator.py"),
)
HOMONYMS = {("cli/arguments.py", "none"), ("cli/arguments.py", "float")}  # there: no width
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]


def strings(node: ast.AST) -> set[str]:
    """The strings that stand in an operand: itself, or the elements of a tuple, list or set."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return set().union(*map(strings, items))
        case _:
            return set()


@functools.cache
def compared_in(file: pathlib.Path) -> tuple[tuple[int, str], ...]:
    """(line, string) of everything that a file of the package compares with."""
    return tuple(compared(ast.parse((PACKAGE / file).read_text())))


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, string) of everything that ==, !=, in, not in or a case compares with."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others):
                found = set().union(*map(strings, [left, *others]))
            case ast.MatchValue(value=value):
                found = strings(value)
            case _:
                continue
        yield from ((node.lineno, text) for text in sorted(found))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_name_of_a_method_is_compared_with(file: pathlib.Path, table: Table):
    if file.is_relative_to(table.home):
        return
    names = {*table.methods, *table.others}
    found = [
        f"{file}:{line}: {text!r}"
        for line, text in compared_in(file)
        if text in names and (file.as_posix(), text) not in HOMONYMS
    ]
    assert found == [], "compare with the method itself, or ask it"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("x == 'mse'", {"mse"}),
        ("'mse' != x", {"mse"}),
        ("x in ('mse', 'kl')", {"mse", "kl"}),
        ("x not in ['kl']", {"kl"}),
        ("0 < y and x in {'kl'}", {"kl"}),
        ("match x:\n case 'a' | 'b': pass\n case ('c', _): pass", {"a", "b", "c"}),
        ("x['mse'], f('mse'), {'mse': 1}, x == y", set()),
    ],
)
def test_comparisons_are_found(code: str, names: set[str]):
    assert {text for _, text in compared(ast.parse(code))} == names
