"""Fitting the layers of a network without an image: on values drawn from what its params say.

A layer whose input is drawn (see `qjax.fit.draws`) is fitted on the draws as it would be on images;
only least-squares fits of kernels are left out. If the input is unknown, the kernel is rounded for
the second moments H = I, which is least squares for the kernel itself. The range of an output is
chosen on draws of that output.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit.draws import Draws, draw_output
from qjax.fit.layer import (
    Corrected,
    Fit,
    Prepared,
    Rounded,
    Values,
    correct,
    fit_output,
    is_output_searched,
    prepare,
    raised_scales,
    round_kernel,
    with_rounded_bias,
)
from qjax.fit.layerwise import Grid, divides_channels, kind_of, known_grid
from qjax.fit.ranges import (
    Task,
    choose_output,
    dynamic_activated,
    output_values,
    seen_by,
    task_of,
    values_between,
)
from qjax.fit.search import Candidates
from qjax.fit.streams import cut
from qjax.formats.affine import QParams
from qjax.formats.dynamic import dynamic
from qjax.graph.activation import NONE, follow_codes
from qjax.graph.batch_norm import output_statistics
from qjax.graph.examples import ExampleAxes
from qjax.graph.fold import Folded
from qjax.graph.jaxpr import shape
from qjax.graph.layers import Network, Site
from qjax.graph.schedule import Activated
from qjax.progress import Progress
from qjax.recipe import LayerRecipe, Recipe
from qjax.run.layer import QuantizedLayer


class UnknownRangeError(ValueError):
    """A range is to be static, and there are neither images nor batch norm to tell it.

    Attributes:
      tensor: whose range it is: `input` or `output`.
    """

    def __init__(self, name: str, tensor: str, reason: str) -> None:
        """Takes the layer's name, `input` or `output`, and why nothing is known."""
        self.tensor = tensor
        remedy = " give `input_range` if it is the network's own," if tensor == "input" else ""
        super().__init__(
            f"`batches` has no images, and nothing is known of the {tensor} of layer {name!r}: "
            f"{reason}. Pass images,{remedy} ask for ranges that are found at run time "
            f"(ranges='dynamic'), or leave it in float: "
            f"overrides={{{name!r}: {{'{tensor}s': None}}}}."
        )


def fit_without_data(
    network: Network,
    leaves: Sequence[jax.Array],
    folded: Sequence[Folded],
    recipe: Recipe,
    progress: Progress,
    examples: Mapping[str, ExampleAxes],
    input_range: tuple[float, float] | None,
) -> dict[str, Fit]:
    """Quantizes every layer of a network without data.

    Args:
      network: the network, traced at `draws.EXAMPLES` examples.
      leaves: the leaves of its params.
      folded: kernel and bias of each layer.
      recipe: what to do, see `Recipe.without_data`.
      progress: called with (layer name, layers done, layers).
      examples: the axes of the examples by layer.
      input_range: of the network's inputs; None if it is unknown.

    Returns:
      A `Fit` per layer, by name, in dataflow order.

    Raises:
      UnknownRangeError: a range is to be static, and nothing is known of the values.
    """
    names = [site.layer.name for site in network.first_sites]
    recipes = recipe.by_layer(names)
    fitting = _Fitting(network, leaves, folded, recipe, examples, input_range)
    for segment in cut(network):
        fitting.draws.advance(segment)
        for equation in segment.equations:
            follow_codes(equation, fitting.grids, lambda grid: grid.greatest)
        match segment.step:
            case Site(layer=layer) as site if layer.name not in fitting.fits:
                progress(layer.name, len(fitting.fits), len(names))
                fitting.fit(site, recipes[layer.name])
            case Activated(site=site) if site in network.first_sites:
                fitting.fit_activated(site, recipes[site.layer.name])
    progress("", len(names), len(names))
    return fitting.fits


class _Fitting:
    """What fitting reads and writes; takes what `fit_without_data` takes."""

    def __init__(
        self,
        network: Network,
        leaves: Sequence[jax.Array],
        folded: Sequence[Folded],
        recipe: Recipe,
        examples: Mapping[str, ExampleAxes],
        input_range: tuple[float, float] | None,
    ) -> None:
        names = [site.layer.name for site in network.first_sites]
        self.draws = Draws(network, leaves, input_range)
        self.grids: dict[core.Var, Grid] = {}
        self.fits: dict[str, Fit] = {}
        self._network, self._examples = network, examples
        self._folded = dict(zip(names, folded, strict=True))
        self._statistics = output_statistics(network, leaves)
        self._candidates = Candidates(recipe.grid_size, recipe.refinements)

    def _task(self, site: Site, recipe: LayerRecipe) -> Task:
        axes = self._examples.get(site.layer.name)
        return task_of(site, recipe, self._candidates, examples=axes)

    def fit(self, site: Site, recipe: LayerRecipe) -> None:
        """Fits a layer up to its pre-activation output, which is drawn where it is known."""
        name, task = site.layer.name, self._task(site, recipe)
        prepared, layer, rounded = self._fit_sum(site, task, recipe)
        y = self._draw(site)
        if y is None and is_output_searched(recipe):
            raise UnknownRangeError(name, "output", "no batch norm follows it")
        outputs, output_clip = self._fit_output(site, task, recipe, layer, y)
        if isinstance(outputs, QParams) and not outputs.scale.ndim:
            assert recipe.outputs is not None
            self.grids[site.output] = Grid(outputs, kind_of(recipe.outputs))
        layer = dataclasses.replace(layer, inputs=prepared.inputs, outputs=outputs)
        sqnr, clip = (math.inf, None) if rounded is None else (rounded.sqnr_db, rounded.clip)
        clips = (clip, prepared.input_clip, output_clip)
        self.fits[name] = Fit(layer, sqnr, None, *clips, raised_scales(layer, rounded))
        if y is not None:
            self.draws.write(site.output, jax.vmap(site.movement)(y))

    def _fit_sum(
        self, site: Site, task: Task, recipe: LayerRecipe
    ) -> tuple[Prepared, QuantizedLayer, Rounded | None]:
        """Fits the input and the kernel of a layer."""
        name, folded = site.layer.name, self._folded[site.layer.name]
        x = self.draws.read(site.input)
        known = known_grid(recipe.inputs, self.grids.get(site.input))
        if x is None:
            prepared = _without_input(task, recipe, name, folded, known)
        else:
            divides = known is None and divides_channels(recipe.inputs, task.operation, x)
            limits = recipe.limits["inputs"]
            prepared = prepare(task, divides, limits, Values(x, x, None), folded, known)
        rounded = None
        if task.recipe.weights is not None:
            rounded = round_kernel(
                prepared.folded.kernel,
                prepared.hessian,
                recipe.limits["weights"],
                spec=task.recipe.weights,
                objective=task.recipe.objective,
                rounding=task.recipe.round_with,
                sweeps=task.recipe.sweeps,
                candidates=task.candidates,
            )
        if x is None:
            layer = with_rounded_bias(task.operation, prepared.folded, prepared.inputs, rounded)
            return prepared, layer, rounded
        inner = dataclasses.replace(task.recipe, outputs=None)
        task = task._replace(recipe=inner, activation=NONE)
        corrected = correct(task, x, None, prepared.float_output, prepared, rounded)
        return prepared, corrected.layer, rounded

    def _draw(self, site: Site) -> jax.Array | None:
        """Draws of a layer's output as its operation leaves it, None if nothing is known of it."""
        name, operation = site.layer.name, site.layer.operation
        if name not in self._statistics:
            return None
        axes = self._examples.get(name)
        [result] = self._network.flat.equations[site.chain[0]].outvars
        return draw_output(
            operation,
            self._statistics[name],
            shape(result),
            None if axes is None else axes.output,
            len(self.fits),
        )

    def _fit_output(
        self, site: Site, task: Task, recipe: LayerRecipe, layer: QuantizedLayer, y: Any
    ) -> tuple[Any, Any]:
        """Chooses the range of an output before the activation, on draws of it if there are any."""
        added = None
        if site.shortcut is not None and not site.movement:
            added = self.draws.read(site.shortcut.value)
        values = None
        if y is not None and is_output_searched(recipe) and not task.has_output_channels:
            objective, seen = task.output_objective, seen_by(task, added is not None)
            values = output_values(objective, seen, task.bounds, task.movement, y, y, added)
        limits = recipe.limits["outputs"]
        return fit_output(task, limits, y, Corrected(layer, y, values, 0), added)

    def fit_activated(self, site: Site, recipe: LayerRecipe) -> None:
        """Fits the range of a layer's output after its activation."""
        position, spec = recipe.output_position, recipe.outputs
        is_already_done = position == "both" and not site.activating
        if spec is None or position == "pre_activation" or is_already_done:
            return
        task, fit = self._task(site, recipe), self.fits[site.layer.name]
        limits, clip = recipe.limits["outputs"], None
        if spec.is_dynamic:
            qparams = dynamic_activated(task, limits)
        else:
            y = self.draws.read(site.activated)
            if y is None:
                raise UnknownRangeError(site.layer.name, "output", "no batch norm follows it")
            qparams, clip = choose_output(
                values_between(task.output_objective, NONE, y, y),
                limits,
                objective=task.output_objective,
                spec=spec.stored,
                activation=NONE,
                candidates=task.candidates,
            )
            self.grids[site.activated] = Grid(qparams, kind_of(spec))
        layer = dataclasses.replace(fit.layer, activated=qparams)
        output_clip = clip if fit.output_clip is None else fit.output_clip
        self.fits[site.layer.name] = fit._replace(layer=layer, output_clip=output_clip)


def _without_input(
    task: Task, recipe: LayerRecipe, name: str, folded: Folded, known: QParams | None
) -> Prepared:
    """A layer before its kernel is rounded, whose input is unknown: H = I."""
    spec, inputs = recipe.inputs, known
    if spec is not None and spec.is_dynamic:
        axis = task.examples and task.examples.input
        inputs = dynamic(spec, recipe.limits["inputs"], axis)
    elif spec is not None and known is None:
        raise UnknownRangeError(name, "input", "no batch norm leads to it")
    groups, patch, _ = task.operation.matrix_shape
    identity = jnp.broadcast_to(jnp.eye(patch, dtype=jnp.float32), (groups, patch, patch))
    return Prepared(None, None, inputs, None, folded, identity)
