"""Fitting the layers of a network one after the other, in dataflow order.

Each layer is fitted on the input that its already quantized predecessors produce (the float input,
unless `Recipe.sequential`) toward the output that the float network has there.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit.ahead import (
    Ahead,
    first_of,
    fitted_outputs,
    float_outputs,
    joined,
    projected,
    quantized_outputs,
)
from qjax.fit.batch_streams import BatchStreams
from qjax.fit.checkpoint import Checkpoint
from qjax.fit.junction import (
    FittedJunction,
    FittedMatmul,
    fit_junction,
    fit_matmul,
    float_product,
    quantized_product,
)
from qjax.fit.layer import Fit, Values, fit_layer
from qjax.fit.layer_by_batch import Given, fit_layer_by_batch, is_fitted_by_batch
from qjax.fit.memory import MEMORIES, Memory
from qjax.fit.ranges import (
    Task,
    choose_output,
    dynamic_activated,
    task_of,
    values_between,
)
from qjax.fit.samples import NeedsAllValuesError
from qjax.fit.search import Candidates
from qjax.fit.streams import Segment, Streams, cast, cut, fixed_values
from qjax.formats.affine import QParams
from qjax.formats.dynamic import ActivationFormat
from qjax.formats.spec import QuantSpec
from qjax.graph import jaxpr
from qjax.graph.activation import NONE, follow_codes
from qjax.graph.examples import ExampleAxes
from qjax.graph.fold import Folded
from qjax.graph.junctions import Junction, find_junctions
from qjax.graph.layers import Network, Site
from qjax.graph.matmuls import Matmul, find_matmuls
from qjax.graph.operation import Linear
from qjax.graph.schedule import Activated
from qjax.graph.tables import names_of_others
from qjax.programs import program
from qjax.progress import Progress
from qjax.recipe import LayerRecipe, Recipe
from qjax.threads import compiled_from_both_ends, cores, is_shape


class Grid(NamedTuple):
    """The grid of codes that a value lies on.

    Attributes:
      qparams: scalars.
      kind: (bits, whether symmetric, which scales).
    """

    qparams: QParams
    kind: tuple[int, bool, str]

    @property
    def greatest(self) -> float:
        """The greatest value; 0 where it is not known yet."""
        return 0.0 if is_shape(self.qparams.scale) else float(self.qparams.range[1])


class State(NamedTuple):
    """What fitting reads and writes.

    Attributes:
      streams: the values that flow through both networks.
      folded: kernel and bias of each layer in float, by name.
      grids: the grids of codes that values lie on.
      fits: the layers that are fitted so far, by name.
      sums: the junctions, and the operands and results of matmuls.
    """

    streams: Streams | BatchStreams
    folded: dict[str, Folded]
    grids: dict[core.Var, Grid]
    fits: dict[str, Fit]
    sums: dict[str, FittedJunction]


class Unit(NamedTuple):
    """What is fitted together: a layer, its output after the activation, a junction or a matmul.

    Attributes:
      segment: the plain equations before it, and the step itself.
      name: of the layer that is finished by it, None if none is.
      fit: fits it and writes what it computes to the streams.
      replay: writes what it computes to the streams once it is fitted.
      note: writes the grid that its value lies on, once it is fitted.
    """

    segment: Segment
    name: str | None
    fit: Callable[[State], None]
    replay: Callable[[State], None]
    note: Callable[[State], None]


def units(
    network: Network,
    recipe: Recipe,
    examples: Mapping[str, ExampleAxes] | None = None,
    has_few_images: bool = False,
) -> tuple[Unit, ...]:
    """Cuts a network into what is fitted together, in the order of fitting.

    Args:
      network: the network.
      recipe: what to do with it.
      examples: the axes of the examples by layer, see `calibrate`.
      has_few_images: whether fits are judged on images held out, and shrunk.
    """
    examples = examples or {}
    matmuls = find_matmuls(network) if recipe.quantizes_matmuls else ()
    names = [site.layer.name for site in network.first_sites]
    recipes = recipe.by_layer(names, names_of_others(network, recipe))
    matmuls = [matmul for matmul in matmuls if _is_quantized(matmul, recipes[matmul.name])]
    candidates = Candidates(recipe.grid_size, recipe.refinements)
    logits = _logits(network) if recipe.logits else None
    found = []
    junctions = find_junctions(network) if recipe.quantizes_sums else ()
    segments = cut(network, junctions, matmuls)
    for number, segment in enumerate(segments):
        match segment.step:
            case Site(layer=layer) as site:
                own, axes = recipes[layer.name], examples.get(layer.name)
                steps = network.sites_of(layer.name)
                task = task_of(site, own, candidates, logits in steps, axes, has_few_images)
                first, *others = steps
                fit = partial(_fit_site, site, task, own)
                if others:
                    fit = partial(_fit_step, steps, site, task, own, segments[number:])
                replay = partial(_replay_site, site, site is first)
                note = partial(_note_layer, layer.name, "outputs", site.output, own)
                name = layer.name if site is first else None
                found.append(Unit(segment, name, fit, replay, note))
            case Activated(site=site):
                own, axes = recipes[site.layer.name], examples.get(site.layer.name)
                steps = network.sites_of(site.layer.name)
                task = task_of(site, own, candidates, logits in steps, axes, has_few_images)
                ahead = segments[number:] if len(steps) > 1 else ()
                fit = partial(_fit_activated, steps, site, task, own, ahead)
                replay = partial(_replay_activated, site)
                note = partial(_note_layer, site.layer.name, "activated", site.activated, own)
                found.append(Unit(segment, None, fit, replay, note))
            case Junction() as junction:
                fit = partial(_fit_junction, junction, recipe)
                replay = partial(_replay_junction, junction)
                note = partial(_note_junction, junction, recipe)
                found.append(Unit(segment, None, fit, replay, note))
            case Matmul() as matmul:
                own = recipes[matmul.name]
                fit = partial(_fit_matmul, matmul, own, candidates)
                replay = partial(_replay_matmul, matmul)
                note = partial(_note_matmul, matmul, own)
                found.append(Unit(segment, None, fit, replay, note))
    return tuple(found)


def _is_quantized(matmul: Matmul, recipe: LayerRecipe) -> bool:
    """Whether a product of two activations is quantized: not where its operands are in float."""
    for field in ("inputs", "outputs"):
        spec = getattr(recipe, field)
        if spec is not None and spec.is_dynamic:
            raise ValueError(
                f"`overrides` must give the matmul {matmul.name!r} static ranges; got `{field}` "
                "with dynamic ranges. Use ranges='static', or leave it in float: inputs=None."
            )
    return recipe.inputs is not None


def calibrate(
    network: Network,
    leaves: Sequence[jax.Array],
    folded: Sequence[Folded],
    batches: Sequence[Any],
    recipe: Recipe,
    progress: Progress,
    examples: Mapping[str, ExampleAxes] | None = None,
    checkpoint: Checkpoint | None = None,
    memory: Memory = MEMORIES["device"],
    whole: Callable[[Any], Any] | None = None,
    tables: Mapping[core.Var, jax.Array] | None = None,
    has_few_images: bool = False,
) -> tuple[dict[str, Fit], dict[str, FittedJunction]]:
    """Quantizes every layer of a network, and its junctions where the recipe says so.

    Args:
      network: the network, traced at the size of the batches.
      leaves: the leaves of its params.
      folded: kernel and bias of each layer.
      batches: the leaves of an input: those of all batches stacked, or to be read batch by batch
        where `memory` has a store.
      recipe: what to do.
      progress: called with (layer name, layers done, layers).
      examples: the axes of the examples by layer; needed where ranges are those of examples.
      checkpoint: where what is finished is read and written.
      memory: where the values between layers are kept.
      whole: brings what is fitted to this process, where several work together.
      tables: what quantized tables hold, by their variables.
      has_few_images: whether fits are judged on images held out, and shrunk.

    Returns:
      A `Fit` per layer, and a `FittedJunction` per junction that needs a grid of its own and per
      operand and result of a matmul, by name, in dataflow order.
    """
    names = [site.layer.name for site in network.first_sites]
    streams = streams_of(network, leaves, batches, recipe.sequential, memory, tables)
    state = State(streams, dict(zip(names, folded, strict=True)), {}, {}, {})
    started: list[str] = []
    todo = units(network, recipe, examples, has_few_images)
    done = 0 if checkpoint is None else checkpoint.restore(state.fits, state.sums)
    kept = None
    if checkpoint is not None and 0 < done < len(todo) and isinstance(streams, Streams):
        kept = checkpoint.values(network, batches)
    for unit in todo[:done]:
        if kept is not None and isinstance(streams, Streams):
            streams.pass_over(unit.segment)
        elif done < len(todo):
            streams.advance(unit.segment)
            unit.replay(state)
        _follow(unit.segment, state)
        unit.note(state)
        started += [unit.name] if unit.name else []
    if kept is not None and isinstance(streams, Streams):
        streams.restore(*kept)
    with _compiled_ahead(state, todo[done:]):
        for number, unit in enumerate(todo[done:], done + 1):
            if unit.name is not None:
                if len(started) > 1:  # one layer may still be computed while the next is compiled
                    jax.block_until_ready(state.fits[started[-2]].energies)
                progress(unit.name, len(started), len(names))
                started.append(unit.name)
            _fit_unit(unit, state, whole)
            if checkpoint is not None:
                is_last = number == len(todo)
                live = None
                if isinstance(streams, Streams) and whole is None:
                    live = ({}, {}) if is_last else streams.values
                checkpoint.write(number, state.fits, state.sums, network, live, is_last)
    jax.block_until_ready([fit.energies for fit in state.fits.values()])
    progress("", len(names), len(names))
    return state.fits, state.sums


def _compiled_ahead(state: State, todo: Sequence[Unit]) -> AbstractContextManager[None]:
    """Has a second core, if there is one, compile what the last units take."""
    streams = state.streams
    if cores() < 2 or not isinstance(streams, Streams) or not streams.is_on_default_device:
        return contextlib.nullcontext()
    shapes = State(
        streams.of_shapes(), state.folded, dict(state.grids), dict(state.fits), dict(state.sums)
    )

    def rehearse() -> None:
        for unit in todo:
            _fit_unit(unit, shapes, None)

    return compiled_from_both_ends(rehearse)


def _fit_unit(unit: Unit, state: State, whole: Callable[[Any], Any] | None) -> None:
    state.streams.advance(unit.segment)
    _follow(unit.segment, state)
    unit.fit(state)
    if whole is not None:
        _bring(unit.segment, state, whole)
    unit.note(state)


def _bring(segment: Segment, state: State, whole: Callable[[Any], Any]) -> None:
    """Brings what the step of a segment fitted to this process."""
    match segment.step:
        case Site(layer=layer) | Activated(site=Site(layer=layer)):
            state.fits[layer.name] = whole(state.fits[layer.name])
        case Junction(name=name) if name in state.sums:
            state.sums[name] = whole(state.sums[name])
        case Matmul(name=name):
            fitted = FittedMatmul.found(name, state.sums)
            assert fitted is not None
            state.sums.update(whole(fitted).by_name(name))


def _follow(segment: Segment, state: State) -> None:
    """Writes the grids that the plain equations of a segment leave their values on."""
    for equation in segment.equations:
        follow_codes(equation, state.grids, lambda grid: grid.greatest)


def _logits(network: Network) -> Site:
    """The layer whose output is the output of the network."""
    for site in network.sites:
        if site.output in network.flat.outputs:
            return site
    raise ValueError(
        "`logits` needs a layer whose pre-activation output the network returns; it returns "
        "something else. Quantize with logits=False."
    )


def streams_of(
    network: Network,
    leaves: Sequence[jax.Array],
    batches: Sequence[Any],
    is_sequential: bool,
    memory: Memory,
    tables: Mapping[core.Var, jax.Array] | None = None,
) -> Streams | BatchStreams:
    """Starts both streams of a network; the arguments are those of `calibrate`."""
    fixed = fixed_values(network, leaves, tables or {}, is_sequential)
    inputs = dict(zip(network.flat.inputs, batches, strict=True))
    if memory.store is None:
        return Streams(fixed, inputs)
    return BatchStreams(fixed, inputs, memory.store)


def _fit_site(site: Site, task: Task, recipe: LayerRecipe, state: State) -> None:
    """Fits a layer up to its pre-activation output and writes that to the streams."""
    streams, name, added = state.streams, site.layer.name, None
    if site.shortcut is not None and not site.movement and streams.holds(site.shortcut.value):
        added = site.shortcut.value
    known = known_grid(recipe.inputs, state.grids.get(site.input))
    if isinstance(streams, BatchStreams) and is_fitted_by_batch(task, known):
        given = Given(*streams.stored(site.input), None if added is None else streams.stored(added))
        with contextlib.suppress(NeedsAllValuesError):
            by_batch = fit_layer_by_batch(
                task, recipe.limits, given, state.folded[name], known, streams.store
            )
            state.fits[name] = by_batch.fit
            streams.put(site.output, by_batch.float_output, by_batch.output)
            return
    shortcut = None if added is None else _read(state, added)
    values = Values(*_read(state, site.input), shortcut)
    divides = known is None and divides_channels(recipe.inputs, task.operation, values.x)
    found = fit_layer(task, divides, recipe.limits, values, state.folded[name], known)
    state.fits[name] = found.fit
    _write_outputs(site, found.float_output, found.output, state)


def _write_outputs(site: Site, floats: jax.Array, values: jax.Array, state: State) -> None:
    """Writes what a layer was found to compute to the streams."""
    if isinstance(state.streams, Streams):
        state.streams.write(site.output, floats, values)
    else:
        _replay_site(site, True, state)


def _replay_site(site: Site, is_first: bool, state: State) -> None:
    """Writes what a fitted layer computes to the streams."""
    static, name = (site.layer.operation, site.movement), site.layer.name
    outputs = fitted_outputs if is_first else quantized_outputs
    on_floats = partial(float_outputs, *static, state.folded[name])
    on_values = partial(outputs, *static, state.fits[name].layer)
    state.streams.apply(site.output, on_floats, on_values, site.input)


def _fit_step(
    steps: Sequence[Site],
    site: Site,
    task: Task,
    recipe: LayerRecipe,
    segments: Sequence[Segment],
    state: State,
) -> None:
    """Fits a layer that the steps of a loop share, in the first one, on the inputs of all steps."""
    name, folded = site.layer.name, state.folded[site.layer.name]
    if site is not steps[0]:
        _replay_site(site, False, state)
        return
    ahead = _look_ahead(state)
    inputs = ahead.values(segments, [step.input for step in steps])
    values = Values(*joined(inputs), None)
    grids = [ahead.grids.get(step.input) for step in steps]
    is_shared = all(grid is grids[0] for grid in grids)
    known = known_grid(recipe.inputs, grids[0]) if is_shared else None
    divides = known is None and divides_channels(recipe.inputs, task.operation, values.x)
    found = fit_layer(task, divides, recipe.limits, values, folded, known)
    state.fits[name] = found.fit
    outputs = first_of((found.float_output, found.output), inputs[0][0].shape[0])
    _write_outputs(site, *outputs, state)


def _look_ahead(state: State) -> Ahead:
    return Ahead(state.streams, state.folded, state.fits, state.sums, state.grids)


def _note_layer(name: str, field: str, var: core.Var, recipe: LayerRecipe, state: State) -> None:
    """Writes the grid of a field of a fitted layer, if one grid holds all of its values."""
    format = getattr(state.fits[name].layer, field)
    if isinstance(format, QParams) and not format.scale.ndim:
        assert recipe.outputs is not None
        state.grids[var] = Grid(format, kind_of(recipe.outputs))


def _read(state: State, var: core.Var) -> tuple[jax.Array, jax.Array]:
    """The values of a variable in the float and in the quantized network, in float32."""
    floats, values = state.streams.read(var)
    return _real(floats), _real(values)


def _real(values: jax.Array) -> jax.Array:
    return cast(values, jnp.float32)


def _round(
    state: State, var: core.Var, format: ActivationFormat, floats: jax.Array, values: jax.Array
) -> None:
    """Sets a variable to rounded values, in its own type."""
    own = jaxpr.dtype(var)

    def rounding(values: jax.Array) -> jax.Array:
        return cast(projected(format, _real(values)), own)

    state.streams.round(var, rounding, cast(floats, own), cast(values, own))


def kind_of(spec: QuantSpec) -> tuple[int, bool, str]:
    """What two specs must share for one grid of codes to be of both."""
    return spec.bits, spec.symmetric, spec.scales.name


def known_grid(spec: QuantSpec | None, grid: Grid | None) -> QParams | None:
    """The grid that an input lies on already, if it is what the recipe asks for."""
    is_kept = spec is not None and grid is not None and grid.kind == kind_of(spec)
    return grid.qparams if is_kept and grid is not None else None


def divides_channels(spec: QuantSpec | None, operation: Linear, x: jax.Array) -> bool:
    """Whether the channels of an input get scales of their own."""
    if spec is None or spec.granularity != "per_channel" or not operation.input_axes:
        return False
    return is_shape(x) or float(_least_value(x)) >= 0  # most inputs follow a ReLU


@program()
def _least_value(x: jax.Array) -> jax.Array:
    return x.min()


def _fit_activated(
    steps: Sequence[Site],
    site: Site,
    task: Task,
    recipe: LayerRecipe,
    segments: Sequence[Segment],
    state: State,
) -> None:
    """Fits the range of a layer's output after its activation, in the first step for all."""
    position = recipe.output_position
    is_already_done = position == "both" and not site.activating
    if recipe.outputs is None or position == "pre_activation" or is_already_done:
        return
    floats, values = _read(state, site.activated)
    fit = state.fits[site.layer.name]
    if site is not steps[0]:
        assert fit.layer.activated is not None
        rounded = projected(fit.layer.activated, values)
        _round(state, site.activated, fit.layer.activated, floats, rounded)
        return
    all_floats, all_values = floats, values
    if len(steps) > 1:
        wanted = [step.activated for step in steps]
        all_floats, all_values = joined(_look_ahead(state).values(segments, wanted))
    objective, limits, spec = task.output_objective, recipe.limits["outputs"], task.recipe.outputs
    assert spec is not None
    if spec.is_dynamic:
        qparams, clip = dynamic_activated(task, limits), None
    else:
        qparams, clip = choose_output(
            values_between(objective, NONE, all_floats, all_values),
            limits,
            objective=objective,
            spec=spec,
            activation=NONE,
            candidates=task.candidates,
        )
    _round(state, site.activated, qparams, floats, projected(qparams, values))
    layer = dataclasses.replace(fit.layer, activated=qparams)
    output_clip = clip if fit.output_clip is None else fit.output_clip
    state.fits[site.layer.name] = fit._replace(layer=layer, output_clip=output_clip)


def _fit_junction(junction: Junction, recipe: Recipe, state: State) -> None:
    """Fits the range of a junction, unless it lies on a grid already."""
    if junction.var in state.grids:
        return
    floats, values = _read(state, junction.var)
    fitted, rounded = fit_junction(junction.activation, recipe, floats, values)
    state.sums[junction.name] = fitted
    assert fitted.grid is not None
    _round(state, junction.var, fitted.grid, floats, rounded)


def _replay_junction(junction: Junction, state: State) -> None:
    if junction.name in state.sums:
        grid = state.sums[junction.name].grid
        assert grid is not None
        _round_again(junction.var, grid, state)


def _replay_activated(site: Site, state: State) -> None:
    grid = state.fits[site.layer.name].layer.activated
    if grid is not None:
        _round_again(site.activated, grid, state)


def _round_again(var: core.Var, format: ActivationFormat, state: State) -> None:
    floats, values = _read(state, var)
    _round(state, var, format, floats, projected(format, values))


def _note_junction(junction: Junction, recipe: Recipe, state: State) -> None:
    if junction.name in state.sums:
        grid = state.sums[junction.name].grid
        assert grid is not None
        state.grids[junction.var] = Grid(grid, kind_of(recipe.sum_spec))


def _fit_matmul(matmul: Matmul, recipe: LayerRecipe, candidates: Candidates, state: State) -> None:
    """Fits the ranges of what a matmul multiplies and of its result."""
    lhs, rhs = (_read(state, var) for var in matmul.operands)
    known = tuple(known_grid(recipe.inputs, state.grids.get(var)) for var in matmul.operands)
    fitted, results = fit_matmul(matmul.product, recipe, candidates, lhs, rhs, known)
    state.sums.update(fitted.by_name(matmul.name))
    if isinstance(state.streams, Streams):
        own = jaxpr.dtype(matmul.output)
        state.streams.write(matmul.output, *(cast(values, own) for values in results))
    else:
        _replay_matmul(matmul, state)


def _replay_matmul(matmul: Matmul, state: State) -> None:
    """Writes what a fitted matmul computes to the streams."""
    fitted, own = FittedMatmul.found(matmul.name, state.sums), jaxpr.dtype(matmul.output)
    assert fitted is not None
    quantized = fitted.quantized

    def on_floats(*operands: jax.Array) -> jax.Array:
        return cast(float_product(matmul.product, *map(_real, operands)), own)

    def on_values(*operands: jax.Array) -> jax.Array:
        return cast(quantized_product(matmul.product, quantized, *map(_real, operands)), own)

    state.streams.apply(matmul.output, on_floats, on_values, *matmul.operands)


def _note_matmul(matmul: Matmul, recipe: LayerRecipe, state: State) -> None:
    fitted = FittedMatmul.found(matmul.name, state.sums)
    if fitted is not None and fitted.outputs.grid is not None:
        assert recipe.outputs is not None
        state.grids[matmul.output] = Grid(fitted.outputs.grid, kind_of(recipe.outputs))
