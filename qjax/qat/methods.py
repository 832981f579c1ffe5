"""The table of methods of quantization-aware training, by name."""

from typing import NamedTuple

from qjax.qat.kernels import SCALED, STEPPED, KernelTraining, connected


class Method(NamedTuple):
    """A method of quantization-aware training.

    Attributes:
      name: of the method.
      binary: how kernels of one bit are trained; the others are trained by their steps.
      learns_steps: whether the steps of kernels, inputs and outputs are parameters; else they stay
        as calibration chose them.
      needs_binary: whether the method is for kernels of one bit.
      binarizes_inputs: whether the inputs of layers with kernels of one bit are signs.
      gradient_bits: to which the gradient of every layer's output is rounded, None for float.
    """

    name: str
    binary: KernelTraining = STEPPED
    learns_steps: bool = True
    needs_binary: bool = False
    binarizes_inputs: bool = False
    gradient_bits: int | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lsq"),
        Method("ste", learns_steps=False),
        Method("ste_gradients", learns_steps=False, gradient_bits=8),
        Method("binary_connect", connected(is_stochastic=False), needs_binary=True),
        Method("binary_connect_stochastic", connected(is_stochastic=True), needs_binary=True),
        Method("binary_weights", SCALED, needs_binary=True),
        Method("xnor", SCALED, needs_binary=True, binarizes_inputs=True),
    )
}
