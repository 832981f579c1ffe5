"""The imports inside `qjax/` run one way, and the library keeps to public JAX and never prints."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "qjax"

# Folders and modules in the order of the pipeline: each may import only what stands before
# it. A new module is given its place here.
ORDER = (
    *(
        "atomic",
        "cache",
        "fields",
        "hosts",
        "kept",
        "kept_arrays",
        "programs",
        "progress",
        "pytree",
        "sharing",
        "table",
        "threads",
        "versions",
    ),
    *("formats.base", "formats.affine", "formats.binary", "formats.codebook", "formats.multiples"),
    *("formats.apot", "formats.kmeans", "formats.nf4", "formats.power_of_two", "formats.quantile"),
    *("formats.packing", "formats.scales"),
    *("formats.spec", "formats.fixed_point", "formats.dynamic"),
    *("objectives.base", "objectives.errors", "objectives.divergence", "objectives.table"),
    *("rounding.base", "rounding.metric", "rounding.nearest", "rounding.gptq", "rounding.sweeps"),
    "rounding.table",
    *("targets", "recipe"),
    *("graph.jaxpr", "graph.flatten", "graph.operation", "graph.naming", "graph.chain"),
    *("graph.elementwise", "graph.activation"),
    *(
        "graph.frameworks",
        "graph.layers",
        "graph.fold",
        "graph.junctions",
        "graph.matmuls",
        "graph.tables",
        "graph.schedule",
        "graph.examples",
    ),
    *("graph.fingerprint", "graph.purity", "graph.batch_norm"),
    *(
        "run.matmul",
        "run.interpreter",
        "run.signs",
        "run.layer",
        "run.table",
        "run.packed",
        "run.fake",
        "run.function",
    ),
    *("run.tap", "run.stored"),
    *("fit.images", "fit.memory", "fit.streams", "fit.batch_streams", "fit.estimate"),
    *("fit.sampling", "fit.observers", "fit.moments", "fit.held_out"),
    *(
        "fit.samples",
        "fit.search",
        "fit.ranges",
        "fit.refit",
        "fit.layer",
        "fit.layer_by_batch",
        "fit.suitability",
        "fit.junction",
        "fit.table",
        "fit.checkpoint",
        "fit.ahead",
        "fit.equalize",
    ),
    *("fit.layerwise", "fit.draws", "fit.data_free"),
    *("fit.blends", "fit.scales", "fit.noise", "fit.kept_state", "fit.ends"),
    *("placing", "calibration"),
    *("charts", "report", "rescaled", "checks", "quantize", "directory", "artifact"),
    *(
        "integer.accumulator",
        "integer.requantize",
        "integer.processor",
        "integer.trial",
        "integer.products",
        "integer.pairs",
        "integer.lowerings",
    ),
    *(
        "integer.arguments",
        "integer.constants",
        "integer.chunks",
        "integer.codes",
        "integer.matmul",
    ),
    *("integer.rules", "integer.function", "lowerings"),
    *("export.blocks", "export.nodes", "export.sizes", "export.writer", "export.primitives"),
    *("export.layers", "export.model", "export.function", "export.tflite"),
    *("qat.steps", "qat.kernels", "qat.methods", "qat.function", "qat.prepare", "qat.finish"),
    *("tuning.adam", "tuning.views", "tuning.held_out", "tuning.tune"),
    "study.check",
    *("study.accuracy", "study.quality", "study.cost", "study.sensitivity", "study.allocate"),
    *("study.curves", "study.layer_trace", "study.explain", "study.accumulators"),
    "study.questions",
    *("page.document", "page.quantization", "page.study"),
    *(
        "cli.signals",
        "cli.output",
        "cli.wording",
        "cli.files",
        "cli.compilation_cache",
        "cli.loading",
        "cli.checkpoint",
        "cli.arguments",
        "cli.command",
        "cli.widths",
        "cli.processes",
    ),
    *("cli.trace", "cli.export", "cli.tune", "cli.quantize", "cli.explain"),
    *("cli.accumulators", "cli.training"),
    *("cli.study", "cli.main"),
)
# All that the library and its command line may load, apart from the standard library.
PACKAGES = {"huggingface_hub", "jax", "litert_converter", "numpy", "onnx", "pretrained", "qjax"}
PACKAGES |= {"chex", "matplotlib", "rich", "safetensors"}
PATHS = [path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
MODULES = {
    ".".join(path.parts): PACKAGE / f"{path}.py" for path in PATHS if not path.stem.startswith("__")
}


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


def test_the_modules_of_a_folder_stand_together():
    folders = [module.partition(".")[0] for module in ORDER]
    runs = [
        folder
        for folder, before in zip(folders, [None, *folders], strict=False)
        if folder != before
    ]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_modules_before_it(module: str):
    tree = ast.parse(MODULES[module].read_text())
    own = {name.removeprefix("qjax.") for name in imported(tree) if name.startswith("qjax.")}
    before = set(ORDER[: ORDER.index(module)])
    allowed = {f for name in own for f in (name, name.rpartition(".")[0]) if f in before}
    assert all(name in allowed or name.rpartition(".")[0] in allowed for name in own)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_module_keeps_to_public_jax_and_does_not_print(path: pathlib.Path):
    tree = ast.parse((PACKAGE / f"{path}.py").read_text())
    names = imported(tree)
    assert {name.partition(".")[0] for name in names} <= PACKAGES | sys.stdlib_module_names
    assert not [name for name in names if any(p.startswith("_") for p in name.split("."))]
    if path.parts[0] != "cli":
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert "print" not in {func.id for func in calls if isinstance(func, ast.Name)}
