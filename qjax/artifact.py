"""Saving a quantized network to a directory, and loading it bit for bit.

`model-<SHA-256>.safetensors` holds the arrays of `Quantized.params` by path, the codes of a kernel
as one dense stream of bits (see `qjax.formats.packing`). Types that safetensors has no NumPy name
for, such as bfloat16, are stored as their bytes; integers that are all 0, as most zero points, are
left out.

`manifest.json` holds everything that is no array: formats, shapes, recipe, report, the structure of
the float params, and name and SHA-256 of both files (its own without that entry). The arrays of
another artifact have another name, so that renaming the manifest replaces one by the other.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from qjax import directory
from qjax.directory import MANIFEST, PATTERNS, Files, check_destination, damaged
from qjax.fields import check_fields
from qjax.formats.affine import QParams
from qjax.graph.fingerprint import fingerprint
from qjax.graph.layers import Skipped, find_layers
from qjax.graph.naming import path_names
from qjax.hosts import is_first
from qjax.quantize import Quantized
from qjax.recipe import Recipe
from qjax.report import LayerReport, MatmulReport, Report, SumReport, TableReport
from qjax.run.function import QuantizedFunction
from qjax.run.layer import QuantizedLayer
from qjax.run.matmul import QuantizedMatmul
from qjax.run.stored import (
    UnknownFormatError,
    arrays_of_format,
    arrays_of_layer,
    arrays_of_table,
    by_path,
    check_format,
    check_layer,
    describe_arrays,
    describe_format,
    describe_layer,
    describe_table,
    format_template,
    from_paths,
    layer_template,
    restored_array,
    restored_format,
    restored_layer,
    restored_table,
    storable,
    table_template,
)
from qjax.run.table import QuantizedTable
from qjax.versions import environment, versions

R = TypeVar("R", LayerReport, SumReport, MatmulReport, TableReport)

__all__ = ["MANIFEST", "check_destination", "load", "save", "versions"]

_FEW = 2**24  # elements that may be missing from the file, as they are all 0, without suspicion


def save(path: str | os.PathLike[str], q: Quantized) -> None:
    """Writes a quantized network to a directory, whole or not at all.

    Of several processes (`jax.distributed`) the first one writes, and the others do nothing.

    Args:
      path: the directory to write; an earlier artifact there is replaced.
      q: what `qjax.quantize` returned.

    Raises:
      ValueError: `path` holds something else than an artifact.
      OSError: `path` cannot be written.

    Examples:
      >>> import tempfile, jax.numpy as jnp, qjax
      >>> params, images = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4))
      >>> def apply_fn(params, x):
      ...     return x @ params["w"]
      >>> q = qjax.quantize(apply_fn, params, images, qjax.recipe(4).naive())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/model", q)
      ...     loaded = load(f"{folder}/model", apply_fn)
      >>> bool(jnp.all(loaded.apply_fn(loaded.params, images) == q.apply_fn(q.params, images)))
      True
    """
    if not is_first():
        return
    check_destination(path)
    layers: Mapping[str, QuantizedLayer] = q.params["layers"]
    for name, layer in layers.items():
        try:
            check_layer(layer)
        except ValueError as error:
            raise ValueError(f"`q` cannot be saved: in layer {name!r}, {error}.") from error
    sums: Mapping[str, QParams] = q.params.get("sums", {})
    matmuls: Mapping[str, QuantizedMatmul] = q.params.get("matmuls", {})
    tables: Mapping[str, QuantizedTable] = q.params.get("tables", {})
    arrays = by_path(
        {
            "layers": {name: arrays_of_layer(layer) for name, layer in layers.items()},
            "rest": q.params["rest"],
            "sums": {name: arrays_of_format(grid) for name, grid in sums.items()},
            "matmuls": {
                name: {field: arrays_of_format(grid) for field, grid in matmul.formats.items()}
                for name, matmul in matmuls.items()
            },
            "tables": {name: arrays_of_table(table) for name, table in tables.items()},
        }
    )
    data = safetensors.save(
        {name: storable(array) for name, array in arrays.items() if not _is_integer_zero(array)}
    )
    entries = {"versions": versions(), "environment": environment()}
    entries |= _entries(q) | {"arrays": describe_arrays(arrays)}
    directory.write(Path(path).resolve(), entries, data)


def _entries(q: Quantized) -> dict[str, Any]:
    """All that is no array, but for what describes the process that writes it."""
    layers = q.params["layers"].items()
    sums = q.params.get("sums", {}).items()
    matmuls: Mapping[str, QuantizedMatmul] = q.params.get("matmuls", {})
    return {
        "recipe": q.report.recipe.to_json(),
        "layers": {
            name: {"operand_shape": q.apply_fn.shapes[name], **describe_layer(layer)}
            for name, layer in layers
        },
        "sums": {name: describe_format(grid) for name, grid in sums},
        "matmuls": {
            name: {field: describe_format(grid) for field, grid in matmul.formats.items()}
            for name, matmul in matmuls.items()
        },
        "tables": {
            name: describe_table(table) for name, table in q.params.get("tables", {}).items()
        },
        "rest": list(q.params["rest"]),
        "params": _described(q.apply_fn.params),
        "structure": _structure(q.apply_fn.params),
        "input": _described(q.apply_fn.input),
        "input_structure": _structure(q.apply_fn.input),
        "fingerprint": _fingerprint(q.apply_fn),
        "report": [record_to_json(record) for record in q.report],
        "report_of_sums": [record_to_json(record) for record in q.report.sums],
        "report_of_matmuls": [record_to_json(record) for record in q.report.matmuls],
        "report_of_tables": [record_to_json(record) for record in q.report.tables],
        "skipped": q.report.skipped,
    }


def load(
    path: str | os.PathLike[str], apply_fn: Callable[[Any, Any], Any], params: Any = None
) -> Quantized:
    """Reads a quantized network that `save` wrote.

    Args:
      path: the directory; or "user/model", the name of one in the Hugging Face Hub, which is
        downloaded (needs huggingface_hub) unless there is a directory of that name.
      apply_fn: the function that was quantized.
      params: the float params, or their shapes as `jax.ShapeDtypeStruct`; their values are not
        read. Needed where they are no nested dicts, lists and tuples (Equinox, Flax NNX).

    Returns:
      The `Quantized` that was saved, every array bit for bit.

    Raises:
      ValueError: `path` is no artifact, or one that is damaged or of a newer format; `params` is
        missing or not what was quantized.
      ImportError: `path` is a name in the Hugging Face Hub, and huggingface_hub is not installed.
    """
    files = directory.read(_located(path))
    entries, file = files.entries, files.manifest
    with _explained(file):
        _check_entries(entries)
        sums, matmuls, tables = (entries.get(n, {}) for n in ("sums", "matmuls", "tables"))
        template = {
            "layers": {name: layer_template(item) for name, item in entries["layers"].items()},
            "rest": dict.fromkeys(entries["rest"], 0),
            "sums": {name: format_template(grid) for name, grid in sums.items()},
            "matmuls": {
                name: {field: format_template(grid) for field, grid in grids.items()}
                for name, grids in matmuls.items()
            },
            "tables": {name: table_template(table) for name, table in tables.items()},
        }
    arrays = _restored_arrays(files)
    for name in sorted({*path_names(template)} ^ arrays.keys()):
        raise damaged(file, f"arrays/{name}", "it is missing, or belongs to nothing")
    tree = from_paths(template, arrays)
    restored = {"layers": {}, "rest": tree["rest"]}
    for name, stored in tree["layers"].items():
        with _explained(file, f"layers/{name}"):
            layer = restored_layer(stored, entries["layers"][name])
            shape = entries["layers"][name]["operand_shape"]
            if math.prod(shape) != layer.kernel.size:
                raise ValueError(f"a kernel of shape {shape} has no {layer.kernel.size:,} codes")
        with _explained(files.arrays, f"layers/{name}"):
            check_layer(layer)
        restored["layers"][name] = layer
    grids = {}
    for name, stored in tree["sums"].items():
        with _explained(file, f"sums/{name}"):
            grids[name] = restored_format(stored, sums[name])
            check_format(grids[name], "grid")
    if sums:
        restored["sums"] = grids
    products = {}
    for name, stored in tree["matmuls"].items():
        with _explained(file, f"matmuls/{name}"):
            products[name] = _restored_matmul(stored, matmuls[name])
    if matmuls:
        restored["matmuls"] = products
    for name, stored in tree["tables"].items():
        with _explained(file, f"tables/{name}"):
            restored.setdefault("tables", {})[name] = restored_table(stored, tables[name])
    function = QuantizedFunction(
        apply_fn,
        _float_params(file, entries, params),
        {name: tuple(item["operand_shape"]) for name, item in entries["layers"].items()},
        input=_input(file, entries),
    )
    report = _report(file, entries)
    _check_rest(files, tree["rest"])
    q = Quantized(function, jax.tree.map(jnp.asarray, restored), report)
    if entries["version"] > 1:
        _check_function(file, entries, function)
        _check_entries_of(q, file, entries, params is not None)
    return q


def _restored_matmul(stored: Mapping[str, Any], described: Mapping[str, Any]) -> QuantizedMatmul:
    formats: dict[str, Any] = {"outputs": None}
    for field, entry in described.items():
        formats[field] = restored_format(stored[field], entry)
        check_format(formats[field], field)
    return QuantizedMatmul(**formats)


@contextlib.contextmanager
def _explained(file: Path, entry: str = "") -> Iterator[None]:
    """Names the file and the entry where anything fails that is made of them."""
    try:
        yield
    except UnknownFormatError as error:
        raise ValueError(f"{error} It is named in {file}.") from error
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
        *(RecursionError, SafetensorError, TypeError, ValueError),
    ) as error:
        is_plain = isinstance(error, ValueError) and str(error)
        reason = str(error).rstrip(".") if is_plain else f"{type(error).__name__} {error}"
        raise damaged(file, entry, reason) from error


_ENTRIES: dict[str, type] = {
    **dict.fromkeys(("versions", "recipe", "layers", "arrays"), dict),
    **dict.fromkeys(("rest", "params", "report", "skipped"), list),
}


def _check_entries(entries: Mapping[str, Any]) -> None:
    """Refuses a manifest without what every version has."""
    # Earlier versions came without these.
    optional = {"sums": dict, "report_of_sums": list, "environment": dict}
    optional |= {"matmuls": dict, "report_of_matmuls": list}
    optional |= {"tables": dict, "report_of_tables": list}
    for name, kind in (_ENTRIES | {n: k for n, k in optional.items() if n in entries}).items():
        if not isinstance(entries.get(name), kind):
            raise ValueError(f"{name!r} must be a {kind.__name__}; got {entries.get(name)!r:.60}")


def _check_entries_of(
    q: Quantized, file: Path, entries: Mapping[str, Any], is_params_given: bool
) -> None:
    """Refuses a manifest that is not the one that would be written of what was read."""
    known = json.loads(json.dumps(_entries(q)))
    others = {"format", "version", "versions", "environment", "arrays", "fingerprint"}
    others |= {"structure"} if is_params_given else set()
    found = {name: value for name, value in entries.items() if name not in others}
    known = {name: value for name, value in known.items() if name not in others}
    # Another qjax may know of more.
    is_same = entries["versions"].get("qjax") == versions()["qjax"]
    different = _difference(found, known, "", is_same)
    if different is not None:
        raise damaged(file, different, "it is not what was saved")


def _difference(found: Any, known: Any, entry: str, is_same: bool) -> str | None:
    """The first entry that is not the known one; an entry may be missing where not all is same."""
    pairs = None
    if isinstance(found, dict) and isinstance(known, dict):
        names = {**found, **known} if is_same else found
        pairs = [(name, found.get(name, ...), known.get(name, ...)) for name in names]
    elif isinstance(found, list) and isinstance(known, list) and len(found) == len(known):
        pairs = [(i, *both) for i, both in enumerate(zip(found, known, strict=True))]
    if pairs is None:
        return None if found == known else entry
    below = (_difference(a, b, f"{entry}/{name}".strip("/"), is_same) for name, a, b in pairs)
    return next((where for where in below if where is not None), None)


# ---- The function


def _fingerprint(function: QuantizedFunction) -> str | None:
    """The fingerprint of a function at the input that it was quantized at, None if unknown."""
    if function.input is None or _structure(function.input) is None:
        return None
    return fingerprint(find_layers(function.apply_fn, function.params, function.input).flat)


def _check_function(file: Path, entries: Mapping[str, Any], function: QuantizedFunction) -> None:
    """Refuses a function that is not the one that was quantized."""
    if function.input is None:
        return
    try:
        network = find_layers(function.apply_fn, function.params, function.input)
    except Exception as error:  # whatever a function does that is given what it does not expect
        raise ValueError(
            "`apply_fn` must be the function that was quantized; it fails on params and an input "
            f"of the shapes in {file}: {' '.join(str(error).split())[:200]}"
        ) from error
    if fingerprint(network.flat) != entries.get("fingerprint"):
        before, now = entries["versions"].get("jax"), versions()["jax"]
        if before == now:
            raise ValueError(
                "`apply_fn` must be the function that was quantized; it computes something else "
                f"than the fingerprint in {file} tells (another activation, other constants, "
                "another order). Pass that function, or quantize this one and save it."
            )
        warnings.warn(
            f"{file} was saved under jax {before}, and jax {now} traces `apply_fn` to something "
            "else: because of jax, or because it is another function. Check its accuracy, and save "
            "it again.",
            stacklevel=3,
        )
    sites = {site.layer.name: site for site in network.sites}
    for name in sorted(sites.keys() ^ function.shapes.keys()):
        raise damaged(file, f"layers/{name}", "`apply_fn` has other layers")
    for name, site in sites.items():
        described = entries["layers"][name]["kernel_shape"]
        is_same = site.layer.kernel_shape == function.shapes[name]
        if not is_same or list(site.layer.operation.matrix_shape) != described:
            raise damaged(file, f"layers/{name}", "`apply_fn` has a kernel of another shape there")


# ---- The report


def _report(file: Path, entries: Mapping[str, Any]) -> Report:
    """The report of an artifact."""
    kinds = {"report": LayerReport, "report_of_sums": SumReport}
    kinds |= {"report_of_matmuls": MatmulReport, "report_of_tables": TableReport}
    records: dict[str, list[Any]] = {entry: [] for entry in kinds}
    for entry, kind in kinds.items():
        for number, fields in enumerate(entries.get(entry, ())):
            with _explained(file, f"{entry}/{number}"):
                records[entry].append(_record_from_json(kind, fields))
    with _explained(file, "recipe"):
        recipe = Recipe.from_json(entries["recipe"])
    skipped = []
    for number, fields in enumerate(entries["skipped"]):
        with _explained(file, f"skipped/{number}"):
            primitive, shapes, reason = fields
            skipped.append(Skipped(primitive, tuple(map(tuple, shapes)), reason))
    layers, *others = records.values()
    return Report(layers, recipe, skipped, *others)


def record_to_json(record: LayerReport | SumReport | MatmulReport | TableReport) -> dict[str, Any]:
    """Returns a record as JSON values.

    What is not finite (lossless: ∞ dB) becomes null, and decibels that were not measured "unknown".
    """

    def encode(name: str, value: Any) -> Any:
        if value is None and name.endswith("_db"):
            return _UNKNOWN
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: encode(name, value) for name, value in dataclasses.asdict(record).items()}


_UNKNOWN = "unknown"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _record_from_json(record: type[R], fields: Mapping[str, Any]) -> R:
    def decode(name: str, value: Any) -> Any:
        if name.endswith("_db") and (value is None or value == _UNKNOWN):
            return math.inf if value is None else None
        return _tuples(value)

    found = record(**{name: decode(name, value) for name, value in fields.items()})
    check_fields(found)
    return found


def stored_bytes(q: Quantized) -> int:
    """The bytes of all arrays, codes at their true width; an artifact leaves out what is all 0."""
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves(q.params["rest"]))
    records = *q.report, *q.report.sums, *q.report.matmuls, *q.report.tables
    return rest + sum(record.bytes_quantized for record in records)


# ---- Arrays


def _is_integer_zero(array: np.ndarray) -> bool:
    return array.dtype.kind in "iu" and not array.any()


def _restored_arrays(files: Files) -> dict[str, np.ndarray]:
    """The arrays of an artifact by name, each as the manifest says."""
    entries, file = files.entries, files.manifest
    with _explained(files.arrays):
        stored = safetensors.load(files.data)
    with _explained(file, "params"):
        few = max(_FEW, sum(math.prod(shape) for _, shape, _ in entries["params"]))
    arrays = {}
    for name, entry in entries["arrays"].items():
        with _explained(file, f"arrays/{name}"):
            dtype, shape = entry
            array = _restored(stored.get(name), jnp.dtype(dtype), shape, few)
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(
                f"`path` holds {dtype} values at {name!r}, which JAX would round; call "
                'jax.config.update("jax_enable_x64", True) first.'
            )
        arrays[name] = array
    for name in sorted(stored.keys() - arrays.keys()):
        raise damaged(files.arrays, name, "the manifest has no such array")
    return arrays


def _restored(stored: np.ndarray | None, dtype: Any, shape: list[int], few: int) -> np.ndarray:
    """An array of a type and shape; one that is missing is integers that are all 0."""
    if not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
        raise ValueError(f"{dtype} is no type of an array")
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    if stored is None:
        if dtype.kind not in "iu" or math.prod(shape) > few:
            raise ValueError(f"the {dtype}{shape} is missing")
        return np.zeros(shape, dtype)
    return restored_array(stored, dtype, shape)


def _check_rest(files: Files, rest: Mapping[str, np.ndarray]) -> None:
    """Checks that what was not quantized is like the float params, and finite."""
    known = {path: described for path, *described in files.entries["params"]}
    for name, array in rest.items():
        if [list(array.shape), array.dtype.name] != known.get(name):
            raise damaged(files.manifest, f"arrays/rest/{name}", "`params` has another leaf there")
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if is_float and not np.all(np.isfinite(array.astype(np.float32))):
            raise damaged(files.arrays, f"rest/{name}", "it holds NaN or infinity")


# ---- What is no array


def _described(params: Any) -> list[list[Any]]:
    """Path, shape and type of every leaf."""
    leaves = zip(path_names(params), jax.tree.leaves(params), strict=True)
    return [[path, list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves]


def _structure(params: Any) -> Any:
    """The nested containers of a pytree as JSON, None where they are not plain Python ones.

    A leaf is its position; a container is {"dict": [[key, item], ...]}, {"list": [item, ...]} or
    {"tuple": [item, ...]}.
    """
    leaves, treedef = jax.tree.flatten(params)

    def encode(node: Any) -> Any:
        if type(node) is dict and all(type(key) in (str, int) for key in node):
            return {"dict": [[key, encode(item)] for key, item in node.items()]}
        if type(node) in (list, tuple):
            return {type(node).__name__: [encode(item) for item in node]}
        if node is None or type(node) is int:
            return node
        raise TypeError(type(node).__name__)

    try:
        return encode(jax.tree.unflatten(treedef, range(len(leaves))))
    except TypeError:
        return None


def _float_params(file: Path, entries: Mapping[str, Any], params: Any) -> Any:
    """The shapes of the float params, from the caller's or from the manifest."""
    if params is not None:
        _check_params(entries["params"], _described(params))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    if entries.get("structure") is None:
        raise ValueError(
            f"`params` must be given to load {file.parent}: the params that were quantized are no "
            "nested dicts, lists and tuples, and only you can rebuild them. Pass the float params, "
            "or their shapes (`jax.eval_shape` of the function that makes them)."
        )
    with _explained(file, "structure"):
        return _rebuilt(entries["params"], entries["structure"])


def _input(file: Path, entries: Mapping[str, Any]) -> Any:
    """The shapes of the input that was quantized at, None if they are unknown."""
    if entries.get("input_structure") is None:
        return None
    with _explained(file, "input"):
        return _rebuilt(entries["input"], entries["input_structure"])


def _rebuilt(described: Sequence[Any], structure: Any) -> Any:
    """The pytree that has this description and structure."""
    leaves = [jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for _, shape, dtype in described]

    def decode(node: Any) -> Any:
        match node:
            case {"dict": items}:
                return {key: decode(item) for key, item in items}
            case {"list": items}:
                return [decode(item) for item in items]
            case {"tuple": items}:
                return tuple(decode(item) for item in items)
            case None:
                return None
            case _:
                return leaves[node]

    found = decode(structure)
    if [_described(found), _structure(found)] != [described, structure]:
        raise ValueError("it is not the structure of these leaves")
    return found


def _check_params(expected: Sequence[Any], given: Sequence[Any]) -> None:
    def text(leaf: Sequence[Any] | None) -> str:
        return "nothing" if leaf is None else f"{leaf[2]}{leaf[1]} at {leaf[0]!r}"

    for want, got in itertools.zip_longest(expected, given):
        if want != got:
            raise ValueError(
                f"`params` must have the leaves that were quantized: expected {text(want)}, got "
                f"{text(got)}. Pass the params of the same model."
            )


def _located(path: str | os.PathLike[str]) -> Path:
    """The directory of an artifact, downloaded where it is a name in the Hugging Face Hub."""
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return Path(path)
    here = f"`path` {path} is no directory here"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{here}; to read it from the Hugging Face Hub, pip install huggingface_hub."
        ) from error
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(PATTERNS)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{here}, and not to be had from the Hugging Face Hub: {error}") from error
