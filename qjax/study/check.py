"""Looking for inputs that a quantized network was not made for: NaN, infinity, what is clipped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.formats.affine import QParams
from qjax.quantize import Quantized
from qjax.run.layer import QuantizedLayer
from qjax.run.matmul import QuantizedMatmul
from qjax.run.tap import MatmulTap, Tap, tapped
from qjax.table import table


class LayerCheck(NamedTuple):
    """What flows through one layer, or quantized product of two activations, in fake quantization.

    Attributes:
      name: of the layer.
      input: how many elements of its input are NaN or infinite; of a product, of both operands.
      output: how many of its output are, before the activation.
      clipped: the share of its input that lies beyond the range of its codes; None where no range
        was chosen beforehand.
      saturated: of its output, the share at an end of the range that is not 0.
    """

    name: str
    input: int
    output: int
    clipped: float | None
    saturated: float | None


class Check(NamedTuple):
    """What `check` found; `str()` is a table.

    Attributes:
      layers: in dataflow order.
      inputs: how many elements of the network's inputs are NaN or infinite.
      outputs: how many of its outputs are.
    """

    layers: tuple[LayerCheck, ...]
    inputs: int
    outputs: int

    @property
    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity anywhere."""
        counts = [count for layer in self.layers for count in (layer.input, layer.output)]
        return not any((self.inputs, *counts, self.outputs))

    def __str__(self) -> str:
        rows = [
            (name, str(into), str(out), _percent(clipped), _percent(saturated))
            for name, into, out, clipped, saturated in self.layers
        ]
        header = ("layer", "input not finite", "output not finite", "clipped", "saturated")
        footer = ("network", str(self.inputs), str(self.outputs), "", "")
        return table(header, rows, "<>>>>", footer=footer)


def check(q: Quantized, x: Any) -> Check:
    """Reports NaN, infinity and clipped values, layer by layer.

    In fake quantization NaN stays NaN, and infinity becomes the end of a range. Integers have no
    NaN: there it counts as 0, and the network goes on with numbers that mean nothing.

    Args:
      q: a quantized network.
      x: inputs of it.

    Returns:
      A `Check`.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
      >>> images = jnp.linspace(0.0, 1.0, 32).reshape(8, 4)
      >>> q = qjax.quantize(lambda params, x: x @ params["w"], params, images, bits=8)
      >>> found = check(q, images.at[0, 0].set(jnp.nan).at[1, 1].set(9.0))
      >>> found.is_finite, found.inputs, found.outputs, found.layers[0].clipped
      (False, 1, 3, 0.03125)
    """
    layers: Mapping[str, QuantizedLayer] = q.params["layers"]
    matmuls: Mapping[str, QuantizedMatmul] = q.params.get("matmuls", {})
    names, products = ([r.name for r in records] for records in (q.report, q.report.matmuls))
    run = tapped(q.apply_fn.apply_fn, q.apply_fn.params, x, [*names, *products])
    outputs, taps = run(q.params, x)
    records = [_check_layer(name, layers[name], taps[name]) for name in names]
    records += [_check_matmul(name, matmuls[name], taps[name]) for name in products]
    counts = (sum(map(_not_finite, jax.tree.leaves(tree))) for tree in (x, outputs))
    return Check(tuple(records), *counts)


def _check_layer(name: str, layer: QuantizedLayer, tap: Tap) -> LayerCheck:
    clipped = None if layer.grid is None else float(np.mean(_is_clipped(layer.grid, tap.input)))
    counts = _not_finite(tap.input), _not_finite(tap.output)
    return LayerCheck(name, *counts, clipped, _saturated(layer.outputs, tap.output))


def _check_matmul(name: str, matmul: QuantizedMatmul, tap: MatmulTap) -> LayerCheck:
    pairs = ((matmul.lhs, tap.lhs), (matmul.rhs, tap.rhs))
    clipped = np.concatenate([_is_clipped(*pair).ravel() for pair in pairs])
    counts = _not_finite(tap.lhs) + _not_finite(tap.rhs), _not_finite(tap.output)
    saturated = _saturated(matmul.outputs, tap.output)
    return LayerCheck(name, *counts, float(np.mean(clipped)), saturated)


def _is_clipped(grid: QParams, values: Any) -> np.ndarray:
    x, (low, high) = np.asarray(values, np.float32), map(np.asarray, grid.range)
    half = np.asarray(grid.scale) / 2
    return (x < low - half) | (x > high + half)


def _saturated(grid: Any, values: Any) -> float | None:
    """The share of values at an end of their range that is not 0; None without a static one."""
    if not isinstance(grid, QParams):
        return None
    codes, limits = np.asarray(grid.encode(values)), (int(grid.qmin), int(grid.qmax))
    zero = np.asarray(grid.zero_point)
    return float(np.mean(np.isin(codes, limits) & (codes != zero)))


def _not_finite(values: Any) -> int:
    return int(np.sum(~np.isfinite(np.asarray(values, np.float32))))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
