"""Rules of fake quantization: float arithmetic on dequantized codes, differentiable."""

from typing import Any

import jax

from qjax.graph import jaxpr
from qjax.graph.layers import Site
from qjax.run.interpreter import Rules
from qjax.run.layer import QuantizedLayer, apply_layer


def real_value(value: Any, atom: jaxpr.Atom) -> Any:
    """The value itself: everything is real."""
    return value


def fake_layer(site: Site, layer: QuantizedLayer, x: jax.Array) -> jax.Array:
    """Evaluates a layer up to its quantized pre-activation output."""
    return site.movement(apply_layer(site.layer.operation, layer, x))


def fake_activated(site: Site, layer: QuantizedLayer, y: jax.Array) -> jax.Array:
    """Quantizes a layer's output after its activation, where the layer says so."""
    return y if layer.activated is None else layer.activated.project(y)


FAKE = Rules(fake_layer, fake_activated, {}, real_value)
