"""qjax: post-training quantization of JAX networks as one function transformation."""

from qjax.affine import QParams, dequantize, fake_quant, quantize_array, sqnr_db
from qjax.evaluate import top1
from qjax.explain import Explanation, explain
from qjax.io import load, save
from qjax.layers import Layer, trace
from qjax.quantize import Quantized, quantize
from qjax.report import LayerReport, Report
from qjax.spec import QuantSpec, Recipe, recipe

__all__ = [
    "Explanation",
    "Layer",
    "LayerReport",
    "QParams",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Report",
    "dequantize",
    "explain",
    "fake_quant",
    "load",
    "quantize",
    "quantize_array",
    "recipe",
    "save",
    "sqnr_db",
    "top1",
    "trace",
]
