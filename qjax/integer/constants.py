"""What a layer computes with that depends on its parameters alone: found once per parameters."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax

from qjax.formats.affine import QParams
from qjax.graph.operation import Linear
from qjax.integer.lowerings import Method, folded_bias, signed
from qjax.run.layer import QuantizedLayer, accumulator_scale


class Constants(NamedTuple):
    """The constants of a layer with an integer accumulator.

    Attributes:
      bias: int32[groups * channels], from `lowerings.folded_bias`.
      unit: float32[groups * channels], the real value of one unit of the accumulator.
      multiplier: float32[groups * channels], M = unit / s_y; None without one scale of the output.
      inputs: the grid of its input, see `lowerings.signed`.
      outputs: that of its output, where it is known.
    """

    bias: jax.Array
    unit: jax.Array
    multiplier: jax.Array | None
    inputs: QParams
    outputs: QParams | None


class Spec(NamedTuple):
    """What the constants of a layer depend on, apart from its parameters: hashable.

    Attributes:
      name: of the layer.
      operation: its linear operation.
      method: that computes its accumulator.
    """

    name: str
    operation: Linear
    method: Method


@partial(jax.jit, static_argnums=0)
def constants_of(
    specs: tuple[Spec, ...], layers: Mapping[str, QuantizedLayer]
) -> dict[str, Constants]:
    """Finds the constants of layers.

    Args:
      specs: of the layers that have an integer accumulator.
      layers: their parameters, by name.
    """
    return {spec.name: _constants(spec, layers[spec.name]) for spec in specs}


def _constants(spec: Spec, layer: QuantizedLayer) -> Constants:
    assert layer.grid is not None
    unit = accumulator_scale(spec.operation, layer)
    outputs = signed(layer.outputs) if isinstance(layer.outputs, QParams) else None
    multiplier = None
    if outputs is not None and outputs.scale.ndim == 0:
        multiplier = unit * outputs.inverse_scale
    return Constants(folded_bias(layer, spec.method), unit, multiplier, signed(layer.grid), outputs)
