"""Layers and formats as arrays and JSON, and back: what is written to a disk.

A kernel is a stream of bits. The limits of uniform codes stand in the JSON, and all of a format
without other arrays. What comes back is checked before anything is made of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams
from qjax.formats.binary import Signs
from qjax.formats.dynamic import Dynamic
from qjax.formats.packing import codes_at, pack_kernel, spacing, unpack_positions
from qjax.formats.spec import FORMATS, MAX_BITS
from qjax.graph.naming import path_names
from qjax.run.layer import QuantizedLayer
from qjax.run.table import QuantizedTable

FORMAT_FIELDS = ("weights", "inputs", "outputs", "activated")  # of a layer

_LIMITS = ("qmin", "qmax")
_INPUTS = {Signs.name: Signs}  # what an input may be in addition to a format


class UnknownFormatError(ValueError):
    """A kernel has codes of a format that is not among `FORMATS`."""

    def __init__(self, name: object) -> None:
        """Takes the name of the format."""
        super().__init__(
            f"`path` holds weights in the format {name!r}, which this qjax does not know; it knows "
            f"{', '.join(FORMATS)}. Add it to qjax.formats.spec.FORMATS first."
        )


# ---- To arrays and JSON


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a pytree by their paths."""
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return dict(zip(path_names(tree), leaves, strict=True))


def storable(array: np.ndarray) -> np.ndarray:
    """An array in a type that safetensors has a NumPy name for: others as their bytes."""
    is_native = array.dtype.kind in "biuf"
    return np.ascontiguousarray(array) if is_native else np.frombuffer(array.tobytes(), np.uint8)


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Type and shape of arrays, as JSON."""
    return {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}


def restored_array(stored: np.ndarray, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """The array of a type and shape that was made `storable`.

    Raises:
      ValueError: it has another type or size.
    """
    expected = dtype if dtype.kind in "biuf" else np.dtype(np.uint8)
    if stored.dtype != expected or stored.nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{dtype}{shape} is stored as {_text(stored)}")
    return np.frombuffer(stored.tobytes(), dtype).reshape(shape)


def from_paths(template: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A pytree of the structure of a template; the inverse of `by_path`."""
    leaves = [arrays[name] for name in path_names(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def arrays_of_layer(layer: QuantizedLayer) -> dict[str, Any]:
    """The arrays of a layer: its kernel as a stream of bits, those of its formats."""
    kernel, format = layer.kernel, layer.weights
    if format is not None:
        kernel = pack_kernel(kernel, format)
    formats = {field: arrays_of_format(getattr(layer, field)) for field in FORMAT_FIELDS}
    return {"kernel": kernel, "bias": layer.bias} | formats


def arrays_of_table(table: QuantizedTable) -> dict[str, Any]:
    """The arrays of a table, as those of a layer."""
    codes = pack_kernel(table.codes, table.weights)
    return {"codes": codes, "weights": arrays_of_format(table.weights)}


def arrays_of_format(format: Any) -> dict[str, Any] | None:
    """The arrays of a format but for limits; None if there is none, or if it has no others."""
    if format is None or isinstance(format, Dynamic):
        return None
    arrays = {field: getattr(format, field) for field in _array_fields(type(format))}
    return {
        field: a for field, a in arrays.items() if not (_is_affine(format) and field in _LIMITS)
    }


def describe_layer(layer: QuantizedLayer) -> dict[str, Any]:
    """A layer without its arrays, as JSON."""
    formats = {field: describe_format(getattr(layer, field)) for field in FORMAT_FIELDS}
    return {"kernel_shape": list(layer.kernel.shape), **formats}


def describe_table(table: QuantizedTable) -> dict[str, Any]:
    """A table without its arrays, as JSON."""
    return {"shape": list(table.codes.shape), "weights": describe_format(table.weights)}


def describe_format(format: Any) -> Any:
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


def _is_affine(format: Any) -> bool:
    return isinstance(format, QParams)


def _is_dynamic(described: Any) -> bool:
    return isinstance(described, dict) and described["format"] == Dynamic.name


def _array_fields(type: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(type) if not f.metadata.get("static")]


# ---- And back


def layer_template(described: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that a layer has, a placeholder for each."""
    formats = {field: format_template(described[field]) for field in FORMAT_FIELDS}
    return {"kernel": 0, "bias": 0} | formats


def table_template(described: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that a table has, a placeholder for each."""
    return {"codes": 0, "weights": format_template(described["weights"])}


def format_template(described: Any) -> dict[str, int] | None:
    """The arrays that a format has, a placeholder for each."""
    if described is None or _is_dynamic(described):
        return None
    if isinstance(described, list):
        return {"scale": 0, "zero_point": 0}
    name = described["format"]
    if name in _INPUTS:
        return dict.fromkeys(_array_fields(_INPUTS[name]), 0)
    if name not in FORMATS:
        raise UnknownFormatError(name)
    fields = _array_fields(FORMATS[name].type)
    return {field: 0 for field in fields if not ("limits" in described and field in _LIMITS)}


def restored_layer(stored: Mapping[str, Any], described: Mapping[str, Any]) -> QuantizedLayer:
    """Makes a layer of its arrays and its JSON.

    Raises:
      ValueError: they do not belong together.
    """
    formats = {field: restored_format(stored[field], described[field]) for field in FORMAT_FIELDS}
    kernel, shape, format = stored["kernel"], described["kernel_shape"], formats["weights"]
    if len(shape) != 3:
        raise ValueError(f"the kernel must have 3 axes; got the shape {shape}")
    if format is not None:
        kernel = _restored_codes(kernel, format, shape)
    elif list(kernel.shape) != shape or kernel.dtype != jnp.float32:
        raise ValueError(f"the kernel must be float32{shape}; got {_text(kernel)}")
    return QuantizedLayer(kernel, stored["bias"], **formats)


def restored_table(stored: Mapping[str, Any], described: Mapping[str, Any]) -> QuantizedTable:
    """Makes a table of its arrays and its JSON.

    Raises:
      ValueError: they do not belong together, or its numbers mean nothing.
    """
    format, shape = restored_format(stored["weights"], described["weights"]), described["shape"]
    if format is None or len(shape) != 3:
        raise ValueError(f"the table must be codes with 3 axes; got the shape {shape}")
    table = QuantizedTable(_restored_codes(stored["codes"], format, shape), format)
    check_format(format, "weights")
    rows, elements, channels = shape
    _check_blocks(format, rows, elements, channels)
    return table


def _restored_codes(stream: np.ndarray, format: Any, shape: Sequence[int]) -> Any:
    """The codes of a kernel, none of them beyond the last one of the format."""
    if not 1 <= format.bits <= MAX_BITS:
        raise ValueError(f"codes must have 1 to {MAX_BITS} bits; got {format.bits}")
    size = -(-math.prod(shape) * format.bits // 8)
    if stream.dtype != np.uint8 or stream.shape != (size,):
        raise ValueError(
            f"{size:,} bytes hold a kernel of shape {shape} in {format.bits} bits; got "
            f"{_text(stream)}"
        )
    positions = unpack_positions(jnp.asarray(stream), format.bits, tuple(shape))
    if int(positions.max(initial=0)) >= _positions(format):
        raise ValueError(f"the kernel has a code beyond the {_positions(format):,} that there are")
    return codes_at(positions, format)


def _positions(format: Any) -> int:
    """How many codes a format has."""
    levels = getattr(format, "levels", None)
    if levels is not None:
        return levels.shape[-1]
    if _is_affine(format):
        return (int(format.qmax) - int(format.qmin)) // spacing(format) + 1
    return 2**format.bits


def restored_format(arrays: Mapping[str, Any] | None, described: Any) -> Any:
    """Makes a format of its arrays and its JSON."""
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


# ---- What must hold


def check_layer(layer: QuantizedLayer) -> None:
    """Refuses a layer that computes nothing of use.

    Raises:
      ValueError: a scale is not finite and positive, a zero point is no code, a number is not
        finite, or shapes do not fit; the message names the field.
    """
    groups, patch, channels = layer.kernel.shape
    for field in FORMAT_FIELDS:
        check_format(getattr(layer, field), field)
    if layer.weights is None:
        _check_finite("kernel", layer.kernel)
    else:
        _check_blocks(layer.weights, groups, patch, channels)
    expected = jnp.int32 if layer.has_integer_accumulator else jnp.float32
    if layer.bias.shape != (groups * channels,) or layer.bias.dtype != expected:
        what = f"{np.dtype(expected)}[{groups * channels}]"
        raise ValueError(f"bias must be {what}; got {_text(layer.bias)}")
    _check_finite("bias", layer.bias)


def check_format(format: Any, name: str) -> None:
    """Refuses a format whose numbers mean nothing; see `check_layer`."""
    if format is None:
        return
    if isinstance(format, QParams | Dynamic):
        low, high = int(format.qmin), int(format.qmax)
        is_full = hasattr(format, "levels") or not high & (high + 1) and low in (0, -high, ~high)
        if not (low <= 0 < high and is_full and (high - low).bit_length() <= MAX_BITS):
            raise ValueError(f"{name} must have all codes of a width; got {low} to {high}")
    if not isinstance(format, Dynamic):
        for field in _array_fields(type(format)):
            if field in _CHECKS:
                _CHECKS[field](f"{name}/{field}", format)


_LEAST_SCALE = np.finfo(np.float32).tiny  # has a finite inverse


def _check_scale(name: str, format: Any) -> None:
    scale = np.asarray(format.scale)
    if scale.dtype != np.float32 or not np.all((scale >= _LEAST_SCALE) & np.isfinite(scale)):
        raise ValueError(f"{name} must be float32, finite and positive; got {_text(scale)}")


def _check_zero_point(name: str, format: Any) -> None:
    zero_point = np.asarray(format.zero_point)
    is_like = zero_point.shape in ((), format.scale.shape) and zero_point.dtype == np.int32
    if not is_like or np.any((zero_point < int(format.qmin)) | (zero_point > int(format.qmax))):
        raise ValueError(
            f"{name} must be an int32 code, or one for every scale; got {_text(zero_point)}"
        )


def _check_levels(name: str, format: Any) -> None:
    levels = np.asarray(format.levels)
    _check_finite(name, levels)
    if levels.shape[-1] < 2 or np.any(np.diff(levels.astype(np.float64)) < 0):
        raise ValueError(f"{name} must be two levels or more, ascending; got {_text(levels)}")
    ends = int(levels.flat[0]), int(levels.flat[-1])
    if _is_affine(format) and ends != (int(format.qmin), int(format.qmax)):
        raise ValueError(f"{name} must reach from {format.qmin} to {format.qmax}")


def _check_shift(name: str, format: Any) -> None:
    _check_finite(name, format.shift)


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "scale": _check_scale,
    "zero_point": _check_zero_point,
    "levels": _check_levels,
    "shift": _check_shift,
}


def _check_finite(name: str, array: Any) -> None:
    array = np.asarray(array)
    if not np.all(np.isfinite(array.astype(np.float32, copy=False))):
        raise ValueError(f"{name} must be finite; got NaN or infinity in {_text(array)}")


def _check_blocks(format: Any, groups: int, patch: int, channels: int) -> None:
    """Checks that the numbers of a kernel's format belong to its groups, patches and channels."""
    shape = format.step.shape
    allowed = ({1, groups}, {-(-patch // size) for size in range(1, patch + 1)}, {1, channels})
    if len(shape) != 3 or not all(map(lambda size, sizes: size in sizes, shape, allowed)):
        raise ValueError(
            f"weights must have scales for [{groups}, {patch}, {channels}]; got {list(shape)}"
        )


def _text(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
