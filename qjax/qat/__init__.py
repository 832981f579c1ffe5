"""Quantization-aware training, as pure functions without an optimizer."""

from qjax.qat.finish import finish
from qjax.qat.function import TrainableFunction
from qjax.qat.methods import METHODS, Method
from qjax.qat.prepare import Trainable, prepare

__all__ = ["METHODS", "Method", "Trainable", "TrainableFunction", "finish", "prepare"]
