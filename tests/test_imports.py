"""The imports inside `qjax/` run one way, and the library keeps to public JAX and never prints."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "qjax"

# A module may import only modules that stand before it. A new module is given its place here.
ORDER = (
    "spec",
    "progress",
    "affine",
    "interpret",
    "linear",
    "layers",
    "fold",
    "quantized",
    "packing",
    "emit",
    "streams",
    "equalize",
    "observers",
    "search",
    "ranges",
    "rounding",
    "reconstruct",
    "calibrate",
    "report",
    "quantize",
    "sensitivity",
    "allocate",
    "requantize",
    "lowerings",
    "narrow",
    "integer",
    "evaluate",
    "cost",
    "accumulators",
    "io",
    "tap",
    "explain",
    "curves",
    "analysis",
    "studies",
    "svg",
    "document",
    "page",
    "page_study",
    "cli_accumulators",
    "cli_allocate",
    "cli_explain",
    "cli_study",
    "cli",
)
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}


def imported(tree: ast.AST) -> set[str]:
    """The dotted names that the import statements anywhere in `tree` may load."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["qjax" if node.level else None, node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place_in_the_order():
    assert set(MODULES) == set(ORDER)
    assert not list(PACKAGE.glob("*/*.py")), "one file, one concept: no subpackages"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_modules_before_it(module: str):
    tree = ast.parse(MODULES[module].read_text())
    own = {name.split(".")[1] for name in imported(tree) if name.startswith("qjax.")}
    assert own <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_module_keeps_to_public_jax_and_does_not_print(module: str):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = imported(tree)
    assert not [name for name in names if name.startswith(("jax._src", "optax"))]
    if not module.startswith("cli"):
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert "print" not in {func.id for func in calls if isinstance(func, ast.Name)}
