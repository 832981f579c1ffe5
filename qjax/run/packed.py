"""A quantized network whose kernels are held at their true width."""

import dataclasses
from typing import Any

import jax

from qjax.formats.packing import pack_kernel, unpack_kernel
from qjax.pytree import pytree
from qjax.run.layer import QuantizedLayer


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
    """Packs the kernels of a quantized network, to hold it in less memory.

    Args:
      params: `Quantized.params`.

    Returns:
      The same pytree with `PackedCodes` in place of every kernel that consists of codes; for
      `unpack`.

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

    def packed(layer: QuantizedLayer) -> QuantizedLayer:
        if layer.weights is None or isinstance(layer.kernel, PackedCodes):
            return layer
        bits = layer.weights.bits
        stream = pack_kernel(layer.kernel, layer.weights)
        kernel: Any = PackedCodes(stream, layer.kernel.shape, bits)
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
        packed, format = layer.kernel, layer.weights
        kernel = unpack_kernel(packed.stream, format, packed.bits, packed.shape)
        return dataclasses.replace(layer, kernel=kernel)

    return params | {"layers": {name: unpacked(layer) for name, layer in params["layers"].items()}}
