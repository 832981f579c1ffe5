"""What a layer computes with that depends on its parameters alone: found once per parameters."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax

from qjax.formats.affine import QParams
from qjax.graph.operation import Linear
from qjax.integer.lowerings import Method, folded_bias
from qjax.run.layer import QuantizedLayer, accumulator_scale


class Constants(NamedTuple):
    """The constants of a layer with an integer accumulator.

    Attributes:
      bias: int32[groups * channels], from `lowerings.folded_bias`.
      unit: float32[groups * channels], the real value of one unit of the accumulator.
      multiplier: float32[groups * channels], M = unit / s_y; None without one scale of the output.
      kernel: as the method takes it, see `Method.lays_out`; None where it takes the layer's.
    """

    bias: jax.Array
    unit: jax.Array
    multiplier: jax.Array | None
    kernel: jax.Array | None


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
    unit, outputs = accumulator_scale(spec.operation, layer), layer.outputs
    has_one_scale = isinstance(outputs, QParams) and outputs.scale.ndim == 0
    multiplier = unit * outputs.inverse_scale if has_one_scale else None
    method, bias = spec.method, folded_bias(layer, spec.method)
    kernel = method.operands(spec.operation, layer, bias).kernel if method.lays_out else None
    return Constants(bias, unit, multiplier, kernel)
