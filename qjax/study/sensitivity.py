"""What the quantization of one part of one layer alone does to the network's output."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.affine import sqnr_db
from qjax.graph.layers import Site, find_layers, shapes_of
from qjax.progress import Progress
from qjax.quantize import Quantized, quantize
from qjax.recipe import Recipe
from qjax.run.fake import FAKE, real_value
from qjax.run.interpreter import Rules
from qjax.run.layer import QuantizedLayer
from qjax.run.tap import float_layers, tapped

Part = Literal["weights", "activations"]
PARTS: tuple[Part, ...] = get_args(Part)
WIDTHS = (2, 3, 4, 5, 6, 8)
BATCH_SIZE = 128


class Sensitivity(NamedTuple):
    """One part of one layer.

    Attributes:
      layer: its name.
      part: `weights`, or `activations` for its input and its output.
      elements: of the kernel, or of the output for one example.
      errors: by width, Σ‖f̂(x) − f(x)‖² / Σ‖f(x)‖², f̂ being f with only this part quantized.
    """

    layer: str
    part: Part
    elements: int
    errors: Mapping[int, float]


def measure_sensitivities(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    recipe: Recipe,
    widths: tuple[int, ...] = WIDTHS,
    progress: Progress = lambda item, done, total: None,
) -> tuple[Sensitivity, ...]:
    """Quantizes one part of one layer at a time and measures the error of the network's output.

    Kernels are rounded to the nearest code and every layer is fitted on float inputs: the errors
    rank the parts; `quantize` with the whole recipe makes all of them smaller.

    Args:
      apply_fn: a pure inference function of (params, x).
      params: its params.
      images: calibration inputs float[N, ...].
      recipe: which parts are quantized, and how ranges are found; its widths are not read.
      widths: the widths to try.
      progress: called with (what is being done, how much is done, how much there is).

    Returns:
      A record per layer and part that the recipe quantizes.

    Raises:
      ValueError: the recipe quantizes nothing, or `quantize` raises it.
    """
    plain = dataclasses.replace(
        recipe,
        rounding="nearest",
        reconstructions=0,
        sweeps=0,
        sequential=False,
        sums="float",
        matmuls="float",
        tables="float",
    )
    nothing = dataclasses.replace(plain, weights=None, inputs=None, outputs=None, overrides=())
    recipes: dict[Part, Recipe] = {
        "weights": dataclasses.replace(nothing, weights=recipe.weights),
        "activations": dataclasses.replace(nothing, inputs=recipe.inputs, outputs=recipe.outputs),
    }
    parts: list[Part] = [part for part in PARTS if recipes[part] != nothing]
    if not parts:
        raise ValueError("`recipe` quantizes neither weights nor activations: nothing to measure.")
    variants: list[tuple[Part, int]] = [(part, width) for part in parts for width in widths]
    network = quantize(apply_fn, params, images, nothing)
    names = [record.name for record in network.report]
    recipe.by_layer(names)  # a pattern that matches nothing is refused before the long work
    total = len(variants) * (1 + len(names))
    fits = {}
    for part, width in variants:
        progress(f"fitting {part}, {width} bits", len(fits), total)
        fits[part, width] = quantize(apply_fn, params, images, at_width(recipes[part], width))
    floats = network.params["layers"]
    simulation = _Simulation(network, images)
    errors = {}
    for name in names:
        for part, width in variants:
            progress(name, len(fits) + len(errors), total)
            layers = fits[part, width].params["layers"]
            errors[name, part, width] = simulation.error(one_quantized(name, floats, layers))
    return tuple(
        Sensitivity(
            record.name,
            part,
            floats[record.name].kernel.size
            if part == "weights"
            else int(jnp.prod(jnp.array(record.output_shape))),
            {width: errors[record.name, part, width] for width in widths},
        )
        for record in network.report
        for part in parts
    )


def at_width(recipe: Recipe, width: int) -> Recipe:
    """The recipe with everything that it quantizes at one width."""
    specs = {part: getattr(recipe, part) for part in ("weights", "inputs", "outputs")}
    changed = {k: spec and spec.at(width) for k, spec in specs.items()}
    return dataclasses.replace(recipe, **changed)


class _Simulation:
    """A network that is compiled once and evaluated with one layer changed at a time."""

    def __init__(self, network: Quantized, images: Any) -> None:
        self._apply = dataclasses.replace(network.apply_fn, rules=EITHER)
        self._rest = network.params["rest"]
        total = len(jax.tree.leaves(images)[0])
        self._batches = [
            jax.tree.map(lambda leaf, start=start: leaf[start : start + BATCH_SIZE], images)
            for start in range(0, total, BATCH_SIZE)
        ]
        self._reference = [
            jax.tree.leaves(network.apply_fn(network.params, batch)) for batch in self._batches
        ]

    def error(self, layers: Mapping[str, "_Either"]) -> float:
        noise = signal = 0.0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            found = jax.tree.leaves(self._apply({"layers": layers, "rest": self._rest}, batch))
            for y_hat, y in zip(found, reference, strict=True):
                noise += float(jnp.sum(jnp.square(y_hat - y)))
                signal += float(jnp.sum(jnp.square(y)))
        return noise / signal if signal else 0.0


class _Either(NamedTuple):
    """A layer in float and as it was quantized, and which of the two counts."""

    is_quantized: jax.Array
    exact: QuantizedLayer
    quantized: QuantizedLayer


def _either(rule: Callable[[Site, QuantizedLayer, jax.Array], jax.Array]) -> Callable[..., Any]:
    def evaluate_one(site: Site, layer: _Either, x: jax.Array) -> jax.Array:
        return lax.cond(
            layer.is_quantized,
            lambda: rule(site, layer.quantized, x),
            lambda: rule(site, layer.exact, x),
        )

    return evaluate_one


EITHER = Rules(_either(FAKE.layer), _either(FAKE.activated), {}, real_value)


def one_quantized(
    name: str | None,
    floats: Mapping[str, QuantizedLayer],
    quantized: Mapping[str, QuantizedLayer],
) -> dict[str, _Either]:
    """The layers of a network of which one is quantized, for the rules `EITHER`.

    Args:
      name: of that layer; None for none.
      floats: the layers in float.
      quantized: as they were quantized.
    """
    return {
        each: _Either(jnp.asarray(each == name), floats[each], layer)
        for each, layer in quantized.items()
    }


def logits_sqnr_alone(q: Quantized, params: Any, x: Any) -> dict[str, float]:
    """Measures each layer alone: the SQNR of the logits with all other layers in float, in dB.

    The layers are taken as they were fitted in the quantized network. One program serves all.

    Args:
      q: the quantized network.
      params: the float params.
      x: images.

    Returns:
      Decibels by layer; the lowest is the most sensitive.
    """
    function = q.apply_fn
    network = find_layers(function.apply_fn, function.params, shapes_of(x))
    floats = float_layers(network, params)
    exact, quantized = floats["layers"], q.params["layers"]
    run = tapped(function.apply_fn, function.params, x, [], EITHER)

    def outputs(alone: str | None) -> Any:
        return run({**floats, "layers": one_quantized(alone, exact, quantized)}, x)[0]

    expected = outputs(None)
    return {name: float(sqnr_db(expected, outputs(name))) for name in quantized}
