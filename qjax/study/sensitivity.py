"""What the quantization of one part of one layer alone does to the network's output."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import QParams, sqnr_db
from qjax.formats.dynamic import ActivationFormat, Dynamic
from qjax.graph.layers import Site, find_layers, shapes_of
from qjax.graph.operation import along_channels
from qjax.progress import Progress
from qjax.quantize import Quantized, quantize
from qjax.recipe import Recipe
from qjax.run.fake import FAKE, real_value
from qjax.run.interpreter import Rules
from qjax.run.layer import QuantizedLayer, scaled_kernel
from qjax.run.tap import float_layers, tapped

Part = Literal["weights", "activations"]
PARTS: tuple[Part, ...] = get_args(Part)
WIDTHS = (2, 3, 4, 5, 6, 8)
BATCH_SIZE = 128
FINE_CODES = 2**23  # what float32 resolves: rounding to so many codes changes nothing
FINE_RANGE = 64  # times a fitted range: nothing is clipped


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Simulated:
    """A layer in real units: kernel [groups, patch, channels], bias [groups * channels]."""

    kernel: jax.Array
    bias: jax.Array
    inputs: ActivationFormat | None
    outputs: ActivationFormat | None
    activated: ActivationFormat | None


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
    exact = {name: _exact(name, network, fits, widths) for name in names}
    simulation = _Simulation(network, images, exact)
    errors = {}
    for name in names:
        for part, width in variants:
            progress(name, len(fits) + len(errors), total)
            layer = fits[part, width].params["layers"][name]
            errors[name, part, width] = simulation.error(name, _simulated(exact[name], layer))
    return tuple(
        Sensitivity(
            record.name,
            part,
            exact[record.name].kernel.size
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

    def __init__(self, network: Quantized, images: Any, exact: Mapping[str, Simulated]) -> None:
        self._apply = dataclasses.replace(network.apply_fn, rules=SIMULATED)
        self._rest, self._exact = network.params["rest"], exact
        total = len(jax.tree.leaves(images)[0])
        self._batches = [
            jax.tree.map(lambda leaf, start=start: leaf[start : start + BATCH_SIZE], images)
            for start in range(0, total, BATCH_SIZE)
        ]
        self._reference = [self._run(exact, batch) for batch in self._batches]

    def _run(self, layers: Mapping[str, Simulated], batch: Any) -> list[jax.Array]:
        return jax.tree.leaves(self._apply({"layers": layers, "rest": self._rest}, batch))

    def error(self, name: str, layer: Simulated) -> float:
        layers = {**self._exact, name: layer}
        noise = signal = 0.0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            for y_hat, y in zip(self._run(layers, batch), reference, strict=True):
                noise += float(jnp.sum(jnp.square(y_hat - y)))
                signal += float(jnp.sum(jnp.square(y)))
        return noise / signal if signal else 0.0


def _simulated_layer(site: Site, layer: Simulated, x: jax.Array) -> jax.Array:
    operation = site.layer.operation
    x = _on_grid(x.astype(jnp.float32), layer.inputs)
    y = operation.evaluate(x, operation.from_matrix(layer.kernel))
    y = y + along_channels(operation, layer.bias, y.ndim)
    return site.movement(_on_grid(y, layer.outputs))


def _simulated_activated(site: Site, layer: Simulated, y: jax.Array) -> jax.Array:
    return _on_grid(y, layer.activated)


def _on_grid(x: jax.Array, format: ActivationFormat | None) -> jax.Array:
    return x if format is None else format.project(x)


SIMULATED = Rules(_simulated_layer, _simulated_activated, {}, real_value)


def _exact(
    name: str, network: Quantized, fits: Mapping[Any, Quantized], widths: tuple[int, ...]
) -> Simulated:
    """A layer in float, with grids too fine to matter where a variant has coarse ones."""
    layer = network.params["layers"][name]
    if ("activations", widths[-1]) not in fits:
        return Simulated(layer.kernel, layer.bias, None, None, None)
    fitted = fits["activations", widths[-1]].params["layers"][name]
    grids = [_fine(grid) for grid in (fitted.inputs, fitted.outputs, fitted.activated)]
    return Simulated(layer.kernel, layer.bias, *grids)


def _simulated(exact: Simulated, layer: QuantizedLayer) -> Simulated:
    """The exact layer with what is quantized in `layer` taken from there."""
    if layer.weights is not None:
        return dataclasses.replace(exact, kernel=scaled_kernel(layer), bias=layer.bias)
    grids = [_stored_alike(grid) for grid in (layer.inputs, layer.outputs, layer.activated)]
    return Simulated(exact.kernel, layer.bias, *grids)


def _fine(qparams: ActivationFormat | None) -> ActivationFormat | None:
    if qparams is None:
        return None
    if isinstance(qparams, Dynamic):
        least = -FINE_CODES // 2 if qparams.spec.symmetric else 0
        limits = {"qmin": np.int32(least), "qmax": np.int32(least + FINE_CODES)}
        return dataclasses.replace(qparams, **limits)
    codes = float(qparams.qmax) - float(qparams.qmin)
    scale = qparams.scale * (codes * (2 * FINE_RANGE / FINE_CODES))
    limit = np.int32(FINE_CODES // 2)
    return QParams(scale, jnp.zeros_like(qparams.zero_point), -limit, limit, _STORED)


def _stored_alike(format: ActivationFormat | None) -> ActivationFormat | None:
    """The same grid, its codes stored as the fine ones would be, so that they share a program."""
    return dataclasses.replace(format, dtype=_STORED) if isinstance(format, QParams) else format


_STORED = np.dtype(np.int32)


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
        layers = {
            name: _Either(jnp.asarray(name == alone), exact[name], layer)
            for name, layer in quantized.items()
        }
        return run({**floats, "layers": layers}, x)[0]

    expected = outputs(None)
    return {name: float(sqnr_db(expected, outputs(name))) for name in quantized}
