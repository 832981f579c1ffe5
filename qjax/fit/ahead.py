"""Looking ahead: the values that the steps of a loop will have, before their layers are fitted.

A layer that all steps share is fitted once, on the inputs of all steps together. These follow from
the layers that are fitted already; those that are not yet compute in float, in both streams.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit.batch_streams import BatchStreams
from qjax.fit.junction import FittedJunction, FittedMatmul, float_or_quantized
from qjax.fit.layer import Fit, in_units_of_codes
from qjax.fit.ranges import project_batches
from qjax.fit.streams import Segment, Streams, cast, map_batches
from qjax.formats.dynamic import ActivationFormat
from qjax.graph import jaxpr
from qjax.graph.activation import follow_codes
from qjax.graph.fold import Folded, apply_folded
from qjax.graph.junctions import Junction
from qjax.graph.layers import Movement, Site
from qjax.graph.matmuls import Matmul
from qjax.graph.operation import Linear
from qjax.graph.schedule import Activated, SpecialStep
from qjax.programs import program
from qjax.run.layer import QuantizedLayer, apply_layer, apply_linear

Values = tuple[jax.Array, jax.Array]


class Ahead:
    """What the network will compute from here on, as far as it is fitted.

    Attributes:
      grids: the grids of codes that values lie on, by variable.
    """

    def __init__(
        self,
        streams: Streams | BatchStreams,
        folded: Mapping[str, Folded],
        fits: Mapping[str, Fit],
        sums: Mapping[str, FittedJunction],
        grids: Mapping[core.Var, Any],
    ) -> None:
        """Takes what is known here; nothing of it is changed."""
        self.grids: dict[core.Var, Any] = dict(grids)
        self._streams = streams.on_device()
        self._folded, self._fits, self._sums = folded, fits, sums

    def values(self, segments: Sequence[Segment], wanted: Sequence[core.Var]) -> list[Values]:
        """Evaluates segments until all wanted values are known.

        Args:
          segments: those to come, the equations of the first one evaluated already.
          wanted: what a layer reads, or its output after the activation.

        Returns:
          float32[batches, ...] in the float and in the quantized network, of each.
        """
        found: dict[core.Var, Values] = {}
        for number, segment in enumerate(segments):
            if number:
                self._streams.advance(segment)
                for equation in segment.equations:
                    follow_codes(equation, self.grids, lambda grid: grid.greatest)
            step = segment.step
            if isinstance(step, Site) and step.input in wanted:
                found[step.input] = self._read(step.input)
            if found.keys() == set(wanted):
                break
            self._evaluate(step)
            if isinstance(step, Activated) and step.site.activated in wanted:
                found[step.site.activated] = self._read(step.site.activated)
        return [found[var] for var in wanted]

    def _read(self, var: core.Var) -> Values:
        floats, values = self._streams.read(var)
        return cast(floats, jnp.float32), cast(values, jnp.float32)

    def _evaluate(self, step: SpecialStep | None) -> None:
        match step:
            case Site(layer=layer) as site:
                fit = self._fits.get(layer.name)
                known = None if fit is None else fit.layer
                pair = self._read(site.input)
                outputs = outputs_of_step(site, self._folded[layer.name], known, pair)
                self._streams.write(site.output, *outputs)
            case Activated(site=site):
                fit = self._fits.get(site.layer.name)
                if fit is not None and fit.layer.activated is not None:
                    self._project(site.activated, fit.layer.activated)
            case Junction() as junction:
                if junction.name in self._sums:
                    self._project(junction.var, self._sums[junction.name].grid)
            case Matmul() as matmul:
                fitted = FittedMatmul.found(matmul.name, self._sums)
                known = None if fitted is None else fitted.quantized
                pairs = [self._read(var) for var in matmul.operands]
                results = float_or_quantized(matmul.product, known, *pairs)
                own = jaxpr.dtype(matmul.output)
                self._streams.write(matmul.output, *(cast(value, own) for value in results))

    def _project(self, var: core.Var, grid: ActivationFormat | None) -> None:
        assert grid is not None
        floats, values = self._streams.read(var)
        rounded = cast(projected(grid, cast(values, jnp.float32)), values.dtype)
        self._streams.write(var, floats, rounded)


def outputs_of_step(
    site: Site, folded: Folded, layer: QuantizedLayer | None, inputs: Values
) -> Values:
    """What a layer computes in one step, in the float and in the quantized network.

    Args:
      site: of the step.
      folded: kernel and bias in float.
      layer: what was fitted; None for nothing yet.
      inputs: float32[batches, ...] each.
    """
    static = site.layer.operation, site.movement
    floats = float_outputs(*static, folded, inputs[0])
    if layer is not None:
        return floats, quantized_outputs(*static, layer, inputs[1])
    if inputs[1] is inputs[0]:
        return floats, floats
    return floats, float_outputs(*static, folded, inputs[1])


@program()
def joined(values: Sequence[Values]) -> Values:
    """The values of all steps as more batches."""
    floats, quantized = zip(*values, strict=True)
    return jnp.concatenate(floats), jnp.concatenate(quantized)


@program(static_argnums=1)
def first_of(values: Values, count: int) -> Values:
    """Of values that are joined, the batches of the first step."""
    return values[0][:count], values[1][:count]


@program(static_argnums=(0, 1))
def float_outputs(operation: Linear, movement: Movement, folded: Folded, x: jax.Array) -> jax.Array:
    """What a layer computes on all batches in the float network."""
    x = x.astype(jnp.float32)
    return map_batches(lambda batch: movement(apply_folded(operation, folded, batch)), x)


@program(static_argnums=(0, 1))
def quantized_outputs(
    operation: Linear, movement: Movement, layer: QuantizedLayer, x: jax.Array
) -> jax.Array:
    """What a layer computes on all batches at inference."""
    x = x.astype(jnp.float32)
    return map_batches(lambda batch: movement(apply_layer(operation, layer, batch)), x)


@program(static_argnums=(0, 1))
def fitted_outputs(
    operation: Linear, movement: Movement, layer: QuantizedLayer, x: jax.Array
) -> jax.Array:
    """What fitting a layer writes: its output, rounded after it is brought to real units."""
    x, inputs = in_units_of_codes(x.astype(jnp.float32), layer.inputs)
    bare = dataclasses.replace(layer, inputs=inputs, outputs=None)
    y = map_batches(lambda batch: apply_linear(operation, bare, batch), x)
    return jax.vmap(movement)(y if layer.outputs is None else project_batches(layer.outputs, y))


@program()
def projected(format: ActivationFormat, values: jax.Array) -> jax.Array:
    """Values of all batches on their grid."""
    return project_batches(format, values)
