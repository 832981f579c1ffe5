"""Runtimes that run quantized networks, and what each of them can run on integers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qjax.formats.affine import AFFINE
from qjax.formats.spec import QuantSpec

SMALLEST_BLOCK = 16  # a power of two, as all blocks are


class Target(NamedTuple):
    """A runtime for quantized networks.

    Attributes:
      name: in `TARGETS`.
      label: its own name.
      symmetric: whether the codes of activations are signed, around 0.
      input_granularities: that the codes of inputs may have; outputs have one scale per tensor.
      clips_first: whether it clips in float before it rounds; otherwise an activation is rounded as
        the layer leaves it, so that layer and rounding become one operation.
      min_bits: of the weights of a layer that runs on integers.
      max_bits: of codes that run on integers.
      block_bits: of weights that a dense layer multiplies with as they are, a scale to a block of
        inputs, its input in float; 0 for none.
      reads_onnx: whether it takes ONNX models.
    """

    name: str
    label: str
    symmetric: bool = False
    input_granularities: tuple[str, ...] = ("per_tensor",)
    clips_first: bool = False
    min_bits: int = 5
    max_bits: int = 8
    block_bits: int = 0
    reads_onnx: bool = True

    @property
    def activations(self) -> Mapping[str, Any]:
        """The fields of `QuantSpec` that inputs and outputs have for it."""
        return {"symmetric": self.symmetric}

    def multiplies_blocks(self, bits: int, size: int) -> bool:
        """Whether a dense layer reads weights of that width in blocks of that size as they are."""
        is_block = size >= SMALLEST_BLOCK and size & (size - 1) == 0
        return bits <= self.block_bits and is_block

    def check(self, argument: str, spec: QuantSpec | None) -> None:
        """Refuses a format that the target cannot run.

        Args:
          argument: weights, inputs or outputs.
          spec: the format, None for float.

        Raises:
          ValueError: it is wider than the target's integers, or of another kind.
        """
        if spec is None:
            return
        if spec.bits > self.max_bits:
            raise ValueError(
                f"`{argument}` must have at most {self.max_bits} bits for {self.label}; got "
                f"{spec.bits}, which it would run in float."
            )
        if argument == "weights":
            if not spec.symmetric or spec.family is not AFFINE:
                kind = "symmetric" if spec.symmetric else "asymmetric"
                raise ValueError(
                    "`weights` must be symmetric uniform codes of at least 2 bits for "
                    f"{self.label}; got {kind} ones of {spec.bits} bits in the format "
                    f"{spec.family.name}."
                )
            return
        if spec.is_dynamic:
            raise ValueError(
                f"`{argument}` must have static ranges for {self.label}; got dynamic, which are "
                "found at run time."
            )
        allowed = self.input_granularities if argument == "inputs" else ("per_tensor",)
        if spec.granularity not in allowed:
            raise ValueError(
                f"`{argument}` must have granularity {' or '.join(allowed)} for "
                f"{self.label}; got {spec.granularity}."
            )
        if self.symmetric and not spec.symmetric:
            raise ValueError(
                f"`{argument}` must be symmetric for {self.label}, whose zero points are 0; got "
                f"asymmetric. Quantize with qjax.recipe(target={self.name!r})."
            )


_FOLDED = ("per_tensor", "per_channel")  # scales per channel of an input are part of the kernel

ONNXRUNTIME = Target("onnxruntime", "ONNX Runtime", input_granularities=_FOLDED, block_bits=4)
OPENVINO = Target("openvino", "OpenVINO", input_granularities=_FOLDED)
TENSORRT = Target("tensorrt", "TensorRT", symmetric=True, clips_first=True)
LITERT = Target("litert", "LiteRT", min_bits=2, reads_onnx=False)

TARGETS: dict[str, Target] = {
    target.name: target for target in (ONNXRUNTIME, OPENVINO, TENSORRT, LITERT)
}
