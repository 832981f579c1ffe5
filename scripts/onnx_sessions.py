"""Models in ONNX Runtime, and its own quantization of them."""

import collections
import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

BATCH = 64  # images per batch of calibration
FLOAT_OPERATORS = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}


def session(
    threads: int, model: onnx.ModelProto, optimizes: bool = True, precise: bool = True
) -> tuple[Callable[[np.ndarray], Any], int]:
    """A model in ONNX Runtime, and the number of its layers in float.

    Args:
      threads: that it uses, 0 for one per core.
      model: what is run.
      optimizes: whether operators are fused.
      precise: whether sums of products of int8 may not saturate at 16 bits, as they do by default
        on a CPU without int8 dot instructions.
    """
    import onnxruntime

    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimizes:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        opened = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        operators = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    [name] = (value.name for value in opened.get_inputs())
    in_float = sum(operators[operator] for operator in FLOAT_OPERATORS)
    return lambda x: opened.run(None, {name: x})[0], in_float


def quantize_static(
    floats: onnx.ModelProto, images: np.ndarray, calibration: str = "MinMax"
) -> onnx.ModelProto:
    """Quantizes a float model as ONNX Runtime does: 8 bits, a scale per channel of weights.

    Args:
      floats: the model.
      images: [N, ...], to calibrate on.
      calibration: a name in `onnxruntime.quantization.CalibrationMethod`.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.split(images, range(BATCH, len(images), BATCH)))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {floats.graph.input[0].name: batch}

    # It prints what it does; the table is for the results.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given, prepared, path = (
            str(Path(folder) / f"{name}.onnx") for name in ("given", "prepared", "quantized")
        )
        onnx.save(floats, given)
        try:
            quantization.quant_pre_process(given, prepared)
        except Exception:  # of a shape that its symbolic rules do not know; each has its own
            quantization.quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, calibration),
        )
        return onnx.load(path)
