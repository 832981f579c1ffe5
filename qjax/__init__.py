"""qjax: post-training quantization of JAX networks as one function transformation."""

from qjax.affine import QParams, dequantize, fake_quant, quantize_array, sqnr_db
from qjax.cost import Cost, LayerCost, cost
from qjax.evaluate import top1
from qjax.explain import Explanation, explain
from qjax.integer import integer
from qjax.io import load, save
from qjax.layers import Layer, trace
from qjax.narrow import Accumulator
from qjax.packing import pack, unpack
from qjax.quantize import Quantized, quantize
from qjax.report import LayerReport, Report
from qjax.spec import QuantSpec, Recipe, recipe

__all__ = [
    "Explanation",
    "Accumulator",
    "Cost",
    "Layer",
    "LayerCost",
    "LayerReport",
    "QParams",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Report",
    "cost",
    "dequantize",
    "explain",
    "fake_quant",
    "integer",
    "load",
    "pack",
    "quantize",
    "quantize_array",
    "recipe",
    "save",
    "sqnr_db",
    "top1",
    "trace",
    "unpack",
]
