"""Codes at their true width: two 4-bit codes to a byte, eight 3-bit codes to three bytes.

Codes become one dense stream of bits: code i, less the smallest code, takes the bits i·b to
i·b + b − 1, the lowest first.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.affine import QParams
from qjax.run.layer import QuantizedLayer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCodes:
    """The codes of a kernel as a stream.

    Attributes:
      stream: uint8[ceil(count · bits / 8)].
      shape: of the codes (static).
    """

    stream: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def pack(params: Any) -> Any:
    """Packs the kernels of a quantized network, to hold it in less memory.

    Args:
      params: `Quantized.params`.

    Returns:
      The same pytree with `PackedCodes` in place of every kernel that consists of codes; for
      `unpack`.
    """

    def packed(layer: QuantizedLayer) -> QuantizedLayer:
        if layer.weights is None or isinstance(layer.kernel, PackedCodes):
            return layer
        stream = pack_codes(layer.kernel, layer.weights)
        kernel: Any = PackedCodes(stream, layer.kernel.shape)
        return dataclasses.replace(layer, kernel=kernel)

    return params | {"layers": {name: packed(layer) for name, layer in params["layers"].items()}}


def unpack(params: Any) -> Any:
    """Unpacks what `pack` packed; a pure function, to be called inside of `jax.jit`.

    Args:
      params: what `pack` returned.

    Returns:
      `Quantized.params`.
    """

    def unpacked(layer: Any) -> QuantizedLayer:
        if not isinstance(layer.kernel, PackedCodes):
            return layer
        kernel = unpack_codes(layer.kernel.stream, layer.weights, layer.kernel.shape)
        return dataclasses.replace(layer, kernel=kernel)

    return params | {"layers": {name: unpacked(layer) for name, layer in params["layers"].items()}}


def pack_codes(codes: jax.Array, qparams: QParams) -> jax.Array:
    """Joins codes to one stream of bits.

    Args:
      codes: integers from `qmin` to `qmax`, of any shape.
      qparams: their format.

    Returns:
      uint8[ceil(codes.size · bits / 8)].
    """
    offsets = codes.astype(jnp.int32).reshape(-1, 1) - qparams.qmin
    bits = (offsets >> jnp.arange(qparams.bits)[None]) & 1
    return jnp.packbits(bits.astype(jnp.uint8).reshape(-1), bitorder="little")


def unpack_codes(stream: jax.Array, qparams: QParams, shape: Sequence[int]) -> jax.Array:
    """Cuts a stream of bits into codes; the inverse of `pack_codes`.

    Args:
      stream: uint8[bytes].
      qparams: the format of the codes.
      shape: of the codes.

    Returns:
      Integers of type `qparams.dtype` and shape `shape`.
    """
    width = qparams.bits
    bits = jnp.unpackbits(stream, count=math.prod(shape) * width, bitorder="little")
    offsets = jnp.sum(bits.reshape(-1, width).astype(jnp.int32) << jnp.arange(width)[None], axis=1)
    return (offsets + qparams.qmin).astype(qparams.dtype).reshape(shape)
