"""A quantized network whose kernels are held at their true width."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qjax.formats.packing import pack_kernel, unpack_kernel
from qjax.pytree import pytree
from qjax.run.layer import QuantizedLayer
from qjax.run.table import QuantizedTable


@pytree
@dataclasses.dataclass(frozen=True)
class PackedCodes:
    """The codes of a kernel as a stream.

    Attributes:
      stream: uint8[ceil(count · bits / 8)].
      shape: of the codes (static).
      bits: their width (static).
    """

    stream: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})


def pack(params: Any) -> Any:
    """Packs the kernels and tables of a quantized network, to hold it in less memory.

    Args:
      params: `Quantized.params`.

    Returns:
      The same pytree with `PackedCodes` in place of every kernel that consists of codes, and of the
      codes of tables; for `unpack`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from qjax.formats.affine import QParams
      >>> weights = QParams(jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2), jnp.int32), -7, 7)
      >>> kernel = jnp.array([[[1, -7], [3, 7]]], jnp.int8)
      >>> layer = QuantizedLayer(kernel, jnp.zeros(2), weights, None, None, None)
      >>> packed = pack({"layers": {"w": layer}})
      >>> packed["layers"]["w"].kernel.stream.nbytes, unpack(packed)["layers"]["w"].kernel.tolist()
      (2, [[[1, -7], [3, 7]]])
    """
    return _mapped(_packed, params)


def _packed(codes: Any, format: Any) -> Any:
    if format is None or isinstance(codes, PackedCodes):
        return codes
    return PackedCodes(pack_kernel(codes, format), codes.shape, format.bits)


def _mapped(change: Callable[[Any, Any], Any], params: Any) -> Any:
    """The params with codes changed, by a function of (codes, their format or None)."""

    def layer(old: QuantizedLayer) -> QuantizedLayer:
        return dataclasses.replace(old, kernel=change(old.kernel, old.weights))

    def table(old: QuantizedTable) -> QuantizedTable:
        return dataclasses.replace(old, codes=change(old.codes, old.weights))

    found = params | {"layers": {name: layer(old) for name, old in params["layers"].items()}}
    if "tables" in params:
        found["tables"] = {name: table(old) for name, old in params["tables"].items()}
    return found


def unpack(params: Any) -> Any:
    """Unpacks what `pack` packed; a pure function, to be called inside of `jax.jit`.

    Args:
      params: what `pack` returned.

    Returns:
      `Quantized.params`.
    """
    return _mapped(_unpacked, params)


def _unpacked(codes: Any, format: Any) -> Any:
    if not isinstance(codes, PackedCodes):
        return codes
    return unpack_kernel(codes.stream, format, codes.bits, codes.shape)
