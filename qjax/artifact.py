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
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from qjax import atomic
from qjax.formats.affine import QParams
from qjax.formats.binary import Signs
from qjax.formats.dynamic import Dynamic
from qjax.formats.packing import pack_kernel, unpack_kernel
from qjax.formats.spec import FORMATS
from qjax.graph.layers import Skipped
from qjax.graph.naming import path_names
from qjax.quantize import Quantized
from qjax.recipe import Recipe
from qjax.report import LayerReport, Report, SumReport
from qjax.run.function import QuantizedFunction
from qjax.run.layer import QuantizedLayer

R = TypeVar("R", LayerReport, SumReport)

FORMAT, VERSION = "qjax", 2
READABLE = (1, 2)  # versions; the arrays of 1 are in `_OLDER_ARRAYS`
MANIFEST, ARRAYS = "manifest.json", "model-{}.safetensors"

_OLDER_ARRAYS = "model.safetensors"
_OURS = re.compile(
    rf"{re.escape(MANIFEST)}|model(-[0-9a-f]{{16}})?\.safetensors|{atomic.TEMPORARY.pattern}"
)

_FORMATS = ("weights", "inputs", "outputs", "activated")  # fields of a layer


def save(path: str | os.PathLike, q: Quantized) -> None:
    """Writes a quantized network to a directory, whole or not at all.

    Args:
      path: the directory to write; an earlier artifact there is replaced.
      q: what `qjax.quantize` returned.

    Raises:
      ValueError: `path` holds something else than an artifact.
      OSError: `path` cannot be written.

    Example:
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
    check_destination(path)
    layers: Mapping[str, QuantizedLayer] = q.params["layers"]
    stored = {name: _storable_layer(layer) for name, layer in layers.items()}
    sums: Mapping[str, QParams] = q.params.get("sums", {})
    grids = {name: _arrays_of(grid) for name, grid in sums.items()}
    arrays = _by_path({"layers": stored, "rest": q.params["rest"], "sums": grids})
    data = safetensors.save(
        {name: _storable(array) for name, array in arrays.items() if not _is_integer_zero(array)}
    )
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "recipe": q.report.recipe.to_json(),
        "layers": {
            name: {
                "operand_shape": q.apply_fn.shapes[name],
                "kernel_shape": layer.kernel.shape,
                **{field: _described_format(getattr(layer, field)) for field in _FORMATS},
            }
            for name, layer in layers.items()
        },
        "sums": {name: _described_format(grid) for name, grid in sums.items()},
        "arrays": {name: [array.dtype.name, array.shape] for name, array in arrays.items()},
        "rest": list(q.params["rest"]),
        "params": _described(q.apply_fn.params),
        "structure": _structure(q.apply_fn.params),
        "report": [record_to_json(record) for record in q.report],
        "report_of_sums": [record_to_json(record) for record in q.report.sums],
        "skipped": q.report.skipped,
    }
    _write(Path(path).resolve(), manifest, data)


def load(
    path: str | os.PathLike, apply_fn: Callable[[Any, Any], Any], params: Any = None
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
    path = _located(path)
    manifest, data = _read(path)
    stored = safetensors.load(data)
    arrays = {
        name: _restored(name, stored.get(name), dtype, shape)
        for name, (dtype, shape) in manifest["arrays"].items()
    }
    sums = manifest.get("sums", {})
    template = {
        "layers": {name: _template(layer) for name, layer in manifest["layers"].items()},
        "rest": dict.fromkeys(manifest["rest"], 0),
        "sums": {name: _format_template(grid) for name, grid in sums.items()},
    }
    leaves = [arrays[name] for name in path_names(template)]
    tree = jax.tree.unflatten(jax.tree.structure(template), leaves)
    layers = {
        name: _restored_layer(layer, manifest["layers"][name])
        for name, layer in tree["layers"].items()
    }
    restored = {"layers": layers, "rest": tree["rest"]}
    if sums:
        grids = tree["sums"].items()
        restored["sums"] = {name: _restored_format(grid, sums[name]) for name, grid in grids}
    function = QuantizedFunction(
        apply_fn,
        _float_params(path, manifest, params),
        {name: tuple(layer["operand_shape"]) for name, layer in manifest["layers"].items()},
    )
    report = Report(
        [_record_from_json(LayerReport, record) for record in manifest["report"]],
        Recipe.from_json(manifest["recipe"]),
        [
            Skipped(primitive, tuple(map(tuple, shapes)), reason)
            for primitive, shapes, reason in manifest["skipped"]
        ],
        [_record_from_json(SumReport, record) for record in manifest.get("report_of_sums", ())],
    )
    return Quantized(function, jax.tree.map(jnp.asarray, restored), report)


def check_destination(path: str | os.PathLike) -> None:
    """Checks that `save` can write to a directory, without leaving anything in it.

    Args:
      path: the directory, which need not exist; its parents are made.

    Raises:
      ValueError: `path` holds something else than an artifact.
      OSError: `path` cannot be written.
    """
    path = Path(path).resolve()
    if not (_is_ours(path) if path.is_dir() else not path.exists()):
        raise ValueError(
            f"`path` must be new, empty or an artifact of qjax.save; {path} holds something else. "
            "Choose another path, or remove it first."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = atomic.temporary(path if path.is_dir() else path.parent)
    probe.touch()
    probe.unlink()


def record_to_json(record: LayerReport | SumReport) -> dict[str, Any]:
    """Returns a record as JSON values.

    What is not finite (lossless: ∞ dB) becomes null, and decibels that were not measured "unknown".
    """

    def encode(name: str, value: Any) -> Any:
        if value is None and name.endswith("_db"):
            return _UNKNOWN
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: encode(name, value) for name, value in dataclasses.asdict(record).items()}


_UNKNOWN = "unknown"


def _record_from_json(record: type[R], fields: Mapping[str, Any]) -> R:
    def decode(name: str, value: Any) -> Any:
        if name.endswith("_db") and (value is None or value == _UNKNOWN):
            return math.inf if value is None else None
        return tuple(value) if isinstance(value, list) else value

    return record(**{name: decode(name, value) for name, value in fields.items()})


def stored_bytes(q: Quantized) -> int:
    """The bytes of all arrays, codes at their true width; an artifact leaves out what is all 0."""
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves(q.params["rest"]))
    return rest + sum(record.bytes_quantized for record in (*q.report, *q.report.sums))


def versions() -> dict[str, str]:
    """The versions of qjax, jax, numpy and Python that are running."""
    try:
        own = importlib.metadata.version("qjax")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "qjax": own,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


# ---- Arrays


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return dict(zip(path_names(tree), leaves, strict=True))


def _storable(array: np.ndarray) -> np.ndarray:
    is_native = array.dtype.kind in "biuf"
    return np.ascontiguousarray(array) if is_native else np.frombuffer(array.tobytes(), np.uint8)


def _is_integer_zero(array: np.ndarray) -> bool:
    return array.dtype.kind in "iu" and not array.any()


def _restored(name: str, stored: np.ndarray | None, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if stored is None:
        array = np.zeros(shape, jnp.dtype(dtype))
    else:
        array = np.frombuffer(stored.tobytes(), jnp.dtype(dtype)).reshape(shape)
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"`path` holds {dtype} values at {name!r}, which JAX would round; call "
            'jax.config.update("jax_enable_x64", True) first.'
        )
    return array


# ---- Layers


def _storable_layer(layer: QuantizedLayer) -> dict[str, Any]:
    """The arrays of a layer: its kernel as a stream of bits, its formats without what is no array.

    The limits of affine codes stand in the manifest, and all of a format without other arrays.
    """
    kernel, format = layer.kernel, layer.weights
    if format is not None:
        kernel = pack_kernel(kernel, format)
    formats = {field: _arrays_of(getattr(layer, field)) for field in _FORMATS}
    return {"kernel": kernel, "bias": layer.bias} | formats


def _arrays_of(format: Any) -> dict[str, Any] | None:
    if format is None or isinstance(format, Dynamic):
        return None
    arrays = {field: getattr(format, field) for field in _array_fields(type(format))}
    return {
        field: a for field, a in arrays.items() if not (_is_affine(format) and field in _LIMITS)
    }


_LIMITS = ("qmin", "qmax")
_INPUTS = {Signs.name: Signs}  # what an input may be in addition to a format


def _is_affine(format: Any) -> bool:
    return isinstance(format, QParams)


def _is_dynamic(described: Any) -> bool:
    return isinstance(described, dict) and described["format"] == Dynamic.name


def _array_fields(type: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(type) if not f.metadata.get("static")]


def _described_format(format: Any) -> Any:
    """A format without its arrays, as JSON: affine ones by their limits, others by their name."""
    if format is None:
        return None
    if _is_affine(format):
        limits = [int(format.qmin), int(format.qmax)]
        return limits if type(format) is QParams else {"format": format.name, "limits": limits}
    if isinstance(format, Dynamic):
        return format.to_json()
    fields = dataclasses.fields(format)
    static = {f.name: getattr(format, f.name) for f in fields if f.metadata.get("static")}
    return {"format": format.name, "lowest": int(format.lowest), "bits": format.bits} | static


def _restored_layer(stored: Mapping[str, Any], described: Mapping[str, Any]) -> QuantizedLayer:
    formats = {field: _restored_format(stored[field], described[field]) for field in _FORMATS}
    kernel, format = stored["kernel"], formats["weights"]
    if format is not None:
        kernel = unpack_kernel(kernel, format, format.bits, described["kernel_shape"])
    return QuantizedLayer(kernel, stored["bias"], **formats)


def _restored_format(arrays: Mapping[str, Any] | None, described: Any) -> Any:
    if described is None:
        return None
    if _is_dynamic(described):
        return Dynamic.from_json(described)
    assert arrays is not None
    if isinstance(described, list):
        return QParams(arrays["scale"], arrays["zero_point"], *described)
    if described["format"] in _INPUTS:
        return _INPUTS[described["format"]](**arrays)
    if "limits" in described:
        limits = dict(zip(_LIMITS, described["limits"], strict=True))
        return FORMATS[described["format"]].type(**arrays, **limits)
    fields = _array_fields(FORMATS[described["format"]].type)
    static = {k: v for k, v in described.items() if k not in ("format", "lowest", "bits")}
    return FORMATS[described["format"]].type(**{f: arrays[f] for f in fields}, **static)


def _template(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a layer, a placeholder for each."""
    formats = {field: _format_template(layer[field]) for field in _FORMATS}
    return {"kernel": 0, "bias": 0} | formats


def _format_template(described: Any) -> dict[str, int] | None:
    if described is None or _is_dynamic(described):
        return None
    if isinstance(described, list):
        return {"scale": 0, "zero_point": 0}
    if described["format"] in _INPUTS:
        return dict.fromkeys(_array_fields(_INPUTS[described["format"]]), 0)
    if described["format"] not in FORMATS:
        raise ValueError(
            f"`path` holds weights in the format {described['format']!r}, which this qjax does not "
            f"know; it knows {', '.join(FORMATS)}. Add it to qjax.formats.spec.FORMATS first."
        )
    fields = _array_fields(FORMATS[described["format"]].type)
    return {field: 0 for field in fields if not ("limits" in described and field in _LIMITS)}


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


def _float_params(path: Path, manifest: Mapping[str, Any], params: Any) -> Any:
    """The shapes of the float params, from the caller's or from the manifest."""
    if params is not None:
        _check_params(manifest["params"], _described(params))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    if manifest["structure"] is None:
        raise ValueError(
            f"`params` must be given to load {path}: the params that were quantized are no nested "
            "dicts, lists and tuples, and only you can rebuild them. Pass the float params, or "
            "their shapes (`jax.eval_shape` of the function that makes them)."
        )
    leaves = [
        jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        for _, shape, dtype in manifest["params"]
    ]

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

    return decode(manifest["structure"])


def _check_params(expected: Sequence[Any], given: Sequence[Any]) -> None:
    def text(leaf: Sequence[Any] | None) -> str:
        return "nothing" if leaf is None else f"{leaf[2]}{leaf[1]} at {leaf[0]!r}"

    for want, got in itertools.zip_longest(expected, given):
        if want != got:
            raise ValueError(
                f"`params` must have the leaves that were quantized: expected {text(want)}, got "
                f"{text(got)}. Pass the params of the same model."
            )


# ---- Files


def _located(path: str | os.PathLike) -> Path:
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
        names = [MANIFEST, ARRAYS.format("*"), _OLDER_ARRAYS]
        return Path(snapshot_download(str(path), allow_patterns=names))
    except (OSError, ValueError) as error:
        raise ValueError(f"{here}, and not to be had from the Hugging Face Hub: {error}") from error


def _write(path: Path, manifest: dict[str, Any], data: bytes) -> None:
    """Writes both files: the arrays by a name of their own, then the manifest that names them.

    Who reads meanwhile finds the older artifact until the manifest has changed, and so does
    everybody if this is killed before. Others who save there wait.
    """
    digest = hashlib.sha256(data).hexdigest()
    arrays = ARRAYS.format(digest[:16])
    digests = {arrays: digest, MANIFEST: _manifest_digest(manifest)}
    text = json.dumps(manifest | {"sha256": digests}, indent=1, allow_nan=False)
    is_new = not path.exists()
    path.mkdir(exist_ok=True)
    with _alone(path):
        try:
            atomic.write(path / arrays, data)
            atomic.write(path / MANIFEST, text)
        finally:
            _sweep(path)
            if is_new and not any(path.iterdir()):
                path.rmdir()
    atomic.sync(path.parent)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until nobody else is in this context for a folder; a process that ends leaves it."""
    if fcntl is None:  # there is no such lock on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # nor on some file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Removes what earlier saves left: all of it but the manifest and the arrays that it names."""
    kept = {MANIFEST, *_digests(path)}
    for entry in path.iterdir():
        if entry.name not in kept and _OURS.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
    # Folders that an older qjax left beside the artifact when it was killed.
    for entry in path.parent.iterdir():
        is_left = re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}", entry.name)
        if is_left and entry.is_dir() and _is_ours(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _digests(path: Path) -> Mapping[str, str]:
    """The SHA-256 of the files of an artifact, by name; nothing if there is none."""
    try:
        return json.loads((path / MANIFEST).read_bytes())["sha256"]
    except FileNotFoundError:
        return {}


def _is_ours(path: Path) -> bool:
    """Whether a folder holds an artifact, what was left of one, or nothing."""
    names = {entry.name for entry in path.iterdir()}
    is_whole = _is_artifact(path) if MANIFEST in names else _OLDER_ARRAYS not in names
    return is_whole and all(_OURS.fullmatch(name) for name in names)


def _read(path: Path, attempts: int = 9) -> tuple[dict[str, Any], bytes]:
    """Reads and checks both files: (manifest, bytes of the arrays)."""
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"`path` must be a directory that qjax.save wrote; {path} has no {MANIFEST}."
        )
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise _damaged(path / MANIFEST) from error
    if not _is_manifest(manifest):
        raise ValueError(
            f"`path` must be a directory that qjax.save wrote; {path / MANIFEST} is of another "
            "program."
        )
    if manifest.get("version") not in READABLE:
        raise ValueError(
            f"{path} has artifact format {manifest.get('version')!r}, and this qjax reads formats "
            f"{' and '.join(map(str, READABLE))}; load it with the qjax that wrote it, or a newer "
            "one (pip install -U qjax)."
        )
    digests = manifest.pop("sha256", {})
    if digests.get(MANIFEST) != _manifest_digest(manifest):
        raise _damaged(path / MANIFEST)
    [arrays] = digests.keys() - {MANIFEST}
    try:
        data = (path / arrays).read_bytes()
    except FileNotFoundError:
        if attempts:  # a save has put others in their place
            return _read(path, attempts - 1)
        raise _damaged(path / arrays) from None
    if digests[arrays] != hashlib.sha256(data).hexdigest():
        raise _damaged(path / arrays)
    return manifest, data


def _damaged(file: Path) -> ValueError:
    return ValueError(
        f"{file} is missing, truncated or edited (its SHA-256 is not the one that was saved); copy "
        "it again, or quantize and save again."
    )


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_manifest(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _is_artifact(path: Path) -> bool:
    try:
        return _is_manifest(json.loads((path / MANIFEST).read_bytes()))
    except (OSError, ValueError):
        return False
