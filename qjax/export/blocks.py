"""Dense layers whose weights of 4 bits are multiplied as they are, a scale to a block of inputs."""

from typing import Any, NamedTuple

import numpy as np

from qjax.graph.operation import DotProduct, Linear
from qjax.run.layer import QuantizedLayer
from qjax.targets import Target

BITS = 4
_MIDDLE = 8  # what stands for the code 0


class Blocks(NamedTuple):
    """A kernel in the form of ONNX Runtime's MatMulNBits.

    Attributes:
      codes: uint8[channels, blocks, size / 2], codes + 8, the first of two in the low bits.
      scale: float32[channels * blocks].
    """

    codes: np.ndarray
    scale: np.ndarray

    @property
    def attributes(self) -> dict[str, Any]:
        """Sizes, and accuracy level 1: sums in float32, where the default rounds the input."""
        channels, _, half = self.codes.shape
        return {"N": channels, "bits": BITS, "block_size": 2 * half, "accuracy_level": 1}


def is_block_product(operation: Linear, layer: QuantizedLayer, target: Target) -> bool:
    """Whether a target multiplies a layer's input in float with its codes."""
    if layer.weights is None or layer.inputs is not None or layer.kernel.shape[0] > 1:
        return False
    is_dense = isinstance(operation, DotProduct)
    return is_dense and target.multiplies_blocks(layer.weights.bits, layer.group_size)


def blocks_of(layer: QuantizedLayer) -> Blocks:
    """Packs the kernel of a layer, [1, patch, channels]; the last block is filled up."""
    _, patch, channels = layer.kernel.shape
    count, size = layer.weights.step.shape[1], layer.group_size
    codes = np.full((channels, count * size), _MIDDLE, np.uint8)
    codes[:, :patch] = np.asarray(layer.kernel, np.int32)[0].T + _MIDDLE
    low, high = codes.reshape(channels, count, -1, 2).transpose(3, 0, 1, 2)
    scale = np.broadcast_to(np.asarray(layer.weights.scale)[0], (count, channels))
    return Blocks(low | high << BITS, scale.T.reshape(-1))
