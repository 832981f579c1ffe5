"""The report of a network whose scales are others than those that its layers were fitted with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams
from qjax.report import LayerReport, MatmulReport, Report, SumReport
from qjax.run.layer import QuantizedLayer
from qjax.run.matmul import QuantizedMatmul


def rescaled(
    report: Report,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    noise: Mapping[str, float],
) -> Report:
    """The report with other scales: their shares of the ranges, and the SQNR of outputs.

    The SQNR of kernels stays what rounding left. The recipe says that layers are fitted one after
    the other, as outputs are measured in the network.

    Args:
      report: of the layers as they were fitted.
      before: `Quantized.params` that it is of.
      after: those with other scales.
      noise: SQNR of outputs after the activation, junctions and matmuls, by name; unknown where it
        is missing.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    old, new = before["layers"], after["layers"]
    records = [
        _layer(record, old[record.name], new[record.name], noise.get(record.name))
        for record in report
    ]
    old, new = before.get("sums", {}), after.get("sums", {})
    sums = [
        _sum(record, old[record.name], new[record.name], noise.get(record.name))
        for record in report.sums
    ]
    old, new = before.get("matmuls", {}), after.get("matmuls", {})
    matmuls = [
        _matmul(record, old[record.name], new[record.name], noise.get(record.name))
        for record in report.matmuls
    ]
    recipe = dataclasses.replace(report.recipe, sequential=True)
    return Report(records, recipe, report.skipped, sums, matmuls, report.tables)


def _layer(
    record: LayerReport, before: QuantizedLayer, after: QuantizedLayer, noise: float | None
) -> LayerReport:
    changes: dict[str, Any] = {"output_sqnr_db": noise}
    if after.weights is not None:
        steps = np.asarray(after.weights.step)
        ratio = float(np.mean(steps / np.asarray(before.weights.step)))
        changes["weight_scale"] = float(steps.min()), float(steps.max())
        if record.weight_clip is not None:
            changes["weight_clip"] = record.weight_clip * ratio
    grids = {
        "input": (before.grid, after.grid),
        "output": (before.outputs or before.activated, after.outputs or after.activated),
    }
    for tensor, (old, new) in grids.items():
        if isinstance(old, QParams) and isinstance(new, QParams):
            changes[f"{tensor}_scale"] = float(jnp.mean(new.scale))
            clip = getattr(record, f"{tensor}_clip")
            if clip is not None:
                changes[f"{tensor}_clip"] = clip * float(jnp.mean(new.scale / old.scale))
    return dataclasses.replace(record, **changes)


def _sum(record: SumReport, before: QParams, after: QParams, noise: float | None) -> SumReport:
    return dataclasses.replace(
        record,
        scale=float(after.scale),
        clip=record.clip * float(after.scale / before.scale),
        sqnr_db=record.sqnr_db if noise is None else noise,
    )


def _matmul(
    record: MatmulReport, before: QuantizedMatmul, after: QuantizedMatmul, noise: float | None
) -> MatmulReport:
    ratios = [
        None if old is None or new is None else float(new.scale / old.scale)
        for old, new in zip(before, after, strict=True)
    ]
    clips = tuple(
        clip and ratio and clip * ratio for clip, ratio in zip(record.clips, ratios, strict=True)
    )
    scales = tuple(grid and float(grid.scale) for grid in after)
    sqnr_db = record.output_sqnr_db if noise is None else noise
    return dataclasses.replace(record, scales=scales, clips=clips, output_sqnr_db=sqnr_db)
