"""qjax: post-training quantization of JAX networks as one function transformation."""

from qjax import lowerings, qat, versions
from qjax.artifact import load, save
from qjax.export.function import to_onnx
from qjax.export.tflite import to_tflite
from qjax.formats.affine import QParams, dequantize, fake_quant, quantize_array, sqnr_db
from qjax.formats.fixed_point import FixedPoint, to_fixed_point
from qjax.formats.spec import QuantSpec
from qjax.graph.layers import Layer, trace
from qjax.integer.accumulator import Accumulator
from qjax.integer.function import integer
from qjax.quantize import Quantized, quantize
from qjax.recipe import Recipe, recipe
from qjax.report import LayerReport, MatmulReport, Report, TableReport
from qjax.run.packed import pack, unpack
from qjax.study.accuracy import top1
from qjax.study.check import Check, LayerCheck, check
from qjax.study.cost import Cost, LayerCost, cost
from qjax.study.explain import Explanation, explain
from qjax.tuning.tune import tune

__version__: str = versions.VERSION

__all__ = [
    "Explanation",
    "Accumulator",
    "Check",
    "Cost",
    "FixedPoint",
    "Layer",
    "LayerCheck",
    "LayerCost",
    "LayerReport",
    "MatmulReport",
    "QParams",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Report",
    "TableReport",
    "check",
    "cost",
    "dequantize",
    "explain",
    "fake_quant",
    "integer",
    "load",
    "lowerings",
    "pack",
    "qat",
    "quantize",
    "quantize_array",
    "recipe",
    "save",
    "sqnr_db",
    "to_fixed_point",
    "to_onnx",
    "to_tflite",
    "top1",
    "trace",
    "tune",
    "unpack",
    "__version__",
]
