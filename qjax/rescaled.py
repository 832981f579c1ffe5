"""The report of a network whose scales are others than those that its layers were fitted with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams
from qjax.report import LayerReport, Report, SumReport
from qjax.run.layer import QuantizedLayer


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
      noise: SQNR of outputs after the activation, and of junctions, by name; unknown where it is
        missing.
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
    recipe = dataclasses.replace(report.recipe, sequential=True)
    return Report(records, recipe, report.skipped, sums)


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
