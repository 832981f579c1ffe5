"""The function transformation: a float network in, a quantized one out."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import hosts
from qjax.fit.checkpoint import Checkpoint
from qjax.fit.data_free import fit_without_data
from qjax.fit.draws import EXAMPLES
from qjax.fit.ends import search_ends
from qjax.fit.equalize import equalize
from qjax.fit.estimate import check_memory, choose
from qjax.fit.images import Batches, Cut, Images, Shares, check_finite, images_of
from qjax.fit.junction import FittedMatmul
from qjax.fit.layerwise import calibrate, streams_of
from qjax.fit.memory import Memory, batch_of
from qjax.fit.noise import noise_of
from qjax.fit.search import Candidates
from qjax.fit.table import FittedTable, fit_table
from qjax.graph.examples import ExampleAxes, example_axes, with_one_more
from qjax.graph.fingerprint import digest, fingerprint
from qjax.graph.fold import fold
from qjax.graph.frameworks import check_network
from qjax.graph.junctions import find_junctions
from qjax.graph.layers import Network, check_layers, find_layers, shapes_of
from qjax.graph.matmuls import find_matmuls, left_in_float
from qjax.graph.purity import check_pure
from qjax.graph.schedule import rest_of_params
from qjax.graph.tables import Table, find_tables, names_of_others, without_lookups
from qjax.progress import Progress, progress_bar
from qjax.recipe import Recipe
from qjax.recipe import recipe as make_recipe
from qjax.report import Report, layer_report, matmul_report, sum_report, table_report
from qjax.rescaled import rescaled
from qjax.run.function import QuantizedFunction
from qjax.run.tap import float_layers
from qjax.sharing import AXIS, sharing
from qjax.versions import versions

_logger = logging.getLogger(__name__)

BATCH_SIZE = 128  # calibration images that go through the network together


class Quantized(NamedTuple):
    """A quantized network.

    Attributes:
      apply_fn: a pure function of (params, x), compiled once per shape of x.
      params: `layers`, a `QuantizedLayer` by name; `rest`, the leaves of the float params that are
        still read, by path; `sums`, grids by name, where `Recipe.sums` is quantized; `matmuls`, a
        `QuantizedMatmul` by name, where `Recipe.matmuls` is; and `tables`, a `QuantizedTable` by
        path, where `Recipe.tables` is.
      report: a record per layer; `str(report)` is a table.
    """

    apply_fn: QuantizedFunction
    params: dict[str, Any]
    report: Report


def quantize(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Any = None,
    recipe: Recipe | None = None,
    *,
    bits: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool | Progress = False,
    input_range: tuple[float, float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory: str | None = None,
) -> Quantized:
    """Quantizes a pretrained network without retraining it.

    Args:
      apply_fn: a pure inference function of (params, x).
      params: pytree of arrays; for Flax Linen the whole dict of variables.
      batches: calibration inputs: one array float[N, ...] (or a mapping of arrays, for a network
        with several inputs), a list or an iterator of such, which are held in memory, or anything
        that can be read again: an iterable (a loader of `grain`, a dataset of TFDS as NumPy arrays)
        or a function that returns an iterator. It is read as often as needed, and must give the
        same images every time. Images are cut into batches of equal size, so the result does not
        depend on how they are handed over or on how many devices there are. Each image counts once;
        a few are left out, with a warning, where their number has no divisor that suits. Or, to
        quantize without a single image, the shape of an input as `jax.ShapeDtypeStruct`, whose
        leading axis may have any size: ranges of activations are then found at run time or from the
        statistics of batch norm, see `qjax.fit.data_free`.
      recipe: what to do; by default 8 bits everywhere.
      bits: short for `recipe=qjax.recipe(bits)`.
      mesh: devices to spread the calibration images over; as many of them as divide a batch. Where
        they belong to several processes (`jax.distributed.initialize`), each of these calls
        `quantize` with the same arguments but its own share of the images, and gets the result.
      progress: whether to show a progress bar on standard error (needs rich), or a function to
        call with (layer name, layers done, layers).
      input_range: the least and the greatest value of the network's inputs; only without images.
      checkpoint: a folder for the layers that are finished, with images. Called again with the same
        arguments after it was killed, `quantize` goes on there and ends with the same result, bit
        for bit. What is finished stays in the folder: remove it once the result is saved.
      memory: where the values between layers are kept: `device` (all batches together, the
        fastest), `host` or `disk` (read a batch at a time; a file in the folder for temporary
        files, see `tempfile`), or `recompute` (nowhere: every batch goes through the network again
        whenever a layer reads it). By default the first of them where the values fit, by an
        estimate that is logged. The codes are the same.

    Returns:
      A `Quantized`.

    Raises:
      ValueError: the arguments contradict each other; no calibration image; NaN or infinity in the
        images or the params; no layer, or one that cannot be rewritten; an override that matches no
        layer; a network that draws random numbers, updates a state or has effects.
      TypeError: an argument is of another kind than what it should be.

    Examples:
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
      >>> images = jnp.linspace(0.0, 1.0, 32).reshape(8, 4)
      >>> q = quantize(lambda params, x: x @ params["w"], params, images, bits=8)
      >>> q.params["layers"]["w"].kernel.dtype.name, q.apply_fn(q.params, images).shape
      ('int8', (8, 3))
    """
    if recipe is not None and bits is not None:
        raise ValueError("`recipe` and `bits` were both given; give one of them.")
    recipe = make_recipe(8 if bits is None else bits) if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a qjax.Recipe; got {type(recipe).__name__}.")
    _check_kinds(apply_fn, params, batches, mesh)
    _check_data(batches, mesh, input_range)
    given = {"checkpoint": checkpoint, "memory": memory}
    for argument, use in (("checkpoint", "layers that are fitted"), ("memory", "what is fitted")):
        if given[argument] is not None and _is_shape(batches):
            raise ValueError(
                f"`{argument}` keeps {use} on images, and `batches` has none; leave it out."
            )
    check_memory(memory)
    is_spread = hosts.is_spread(mesh)
    if mesh is not None and is_spread:
        hosts.check_mesh(mesh)
        if recipe.end_search:
            raise ValueError(
                "`end_search` looks at the whole network in one process, and `mesh` has devices of "
                "several; quantize with end_search=0, or in one process."
            )
        params = hosts.on_this(params, mesh)
    check_finite("params", params)
    has_images = not _is_shape(batches)
    images, cut = None, Cut(1, EXAMPLES)
    if has_images:
        if is_spread:
            images = Shares(hosts.together(lambda: images_of(batches)))
        else:
            images = images_of(batches)
        cut = _cut(images.total)
        shapes = _resized(lambda shape: (cut.size, *shape), images.shapes)
    else:
        if recipe.quantizes_sums:
            raise ValueError(
                "`sums` quantized needs the values of sums, and `batches` has no images; pass "
                "images, or leave the sums in float."
            )
        if recipe.quantizes_matmuls:
            raise ValueError(
                "`matmuls` quantized needs the values of their operands, and `batches` has no "
                "images; pass images, or leave the matmuls in float."
            )
        recipe = recipe.without_data()
        shapes = _resized(lambda shape: (EXAMPLES, *shape[1:]), batches)
    network = _traced(apply_fn, params, shapes, batches)
    check_layers(network)
    check_pure(apply_fn, shapes_of(params), shapes, network)
    examples = _example_axes(apply_fn, params, shapes, network, recipe, not has_images)
    leaves = jax.tree.leaves(params)
    with reporter(progress if hosts.is_first() or not is_spread else False) as report_progress:
        folded = fold(network, leaves)
        tables = _fit_tables(network, leaves, recipe)
        sums, placed = {}, []
        if images is not None:
            own, place = _placing(cut.size, mesh)
            devices = list(jnp.zeros(()).devices()) if own is None else list(own.local_devices)
            processes = jax.process_count() if is_spread else 1
            chosen = choose(memory, network, recipe, cut.count, devices, processes)
            placed = _read(images, cut, place, chosen)
            whole = partial(hosts.on_every, mesh=own) if own is not None and is_spread else None
            if recipe.equalize:
                floats = streams_of(network, leaves, placed, False, chosen)
                folded = equalize(network, folded, floats)
                folded = folded if whole is None else whole(folded)
            kept = None
            if checkpoint is not None:
                about = {
                    "function": fingerprint(network.flat),
                    "params": digest(params),
                    "images": images.digest,
                    "recipe": dataclasses.replace(recipe, end_search=0).to_json(),  # of layers
                    "versions": versions(),
                    "devices": sorted(device.device_kind for device in devices),
                }
                kept = _checkpoint(checkpoint, about, is_spread)
            held = {table.var: fit.values(table) for table, fit in tables.items()}
            given = (placed, recipe, report_progress, examples, kept, chosen, whole, held)
            with sharing(own):
                fitted, sums = calibrate(network, leaves, folded, *given)
        else:
            given = (report_progress, examples, input_range)
            fitted = fit_without_data(network, leaves, folded, recipe, *given)
        for name, fit in fitted.items():
            if raised := int(fit.raised):
                _logger.warning(
                    "layer %r: the scales of %d channels of weights are raised, as their biases "
                    "would leave 32 bits.",
                    name,
                    raised,
                )
        junctions = find_junctions(network) if recipe.quantizes_sums else ()
        joined = {j: sums[j.name] for j in junctions if j.name in sums}
        products = find_matmuls(network) if recipe.quantizes_matmuls else ()
        found = {matmul: FittedMatmul.found(matmul.name, sums) for matmul in products}
        matmuls = {matmul: fit for matmul, fit in found.items() if fit is not None}
        layers = [site.layer for site in network.first_sites]
        records = [layer_report(layer, fitted[layer.name]) for layer in layers]
        in_float = left_in_float(network, {matmul.name for matmul in matmuls})
        report = Report(
            records,
            recipe,
            without_lookups(network, in_float, {table.name for table in tables}),
            [sum_report(*item) for item in joined.items()],
            [matmul_report(*item) for item in matmuls.items()],
            [table_report(*item) for item in tables.items()],
        )
        quantized = {
            "layers": jax.tree.map(jnp.asarray, {name: fit.layer for name, fit in fitted.items()}),
            "rest": jax.tree.map(jnp.copy, rest_of_params(network, params)),
        }
        if tables:
            names = {table.name for table in tables}
            quantized["rest"] = {k: v for k, v in quantized["rest"].items() if k not in names}
            quantized["tables"] = {table.name: fit.quantized for table, fit in tables.items()}
        if joined:
            grids = {junction.name: fit.grid for junction, fit in joined.items()}
            quantized["sums"] = jax.tree.map(jnp.asarray, grids)
        if matmuls:
            grids = {matmul.name: fit.quantized for matmul, fit in matmuls.items()}
            quantized["matmuls"] = jax.tree.map(jnp.asarray, grids)
        if recipe.end_search:
            floats = float_layers(network, params, folded)
            count = recipe.end_search
            after = search_ends(network, floats, quantized, placed, count, report_progress)
            batches = (batch_of(placed, number) for number in range(cut.count))
            noise = noise_of(network, floats, after, batches)
            quantized, report = after, rescaled(report, quantized, after, noise)
    kernel_shapes = {layer.name: layer.kernel_shape for layer in layers}
    function = QuantizedFunction(apply_fn, shapes_of(params), kernel_shapes, input=shapes)
    return Quantized(function, quantized, report)


def _fit_tables(
    network: Network, leaves: Sequence[Any], recipe: Recipe
) -> dict[Table, FittedTable]:
    """Rounds the params that the input picks from, where the recipe says so."""
    tables = find_tables(network) if recipe.quantizes_tables else ()
    names = [site.layer.name for site in network.first_sites]
    recipes = recipe.by_layer(names, names_of_others(network, recipe))
    values = dict(zip(network.flat.params, leaves, strict=True))
    candidates = Candidates(recipe.grid_size, recipe.refinements)
    return {
        table: fit_table(table, jnp.asarray(values[table.var]), own, candidates)
        for table in tables
        if (own := recipes[table.name]).weights is not None
    }


def _traced(apply_fn: Callable[[Any, Any], Any], params: Any, shapes: Any, batches: Any) -> Network:
    """Finds the layers of a network, or says that its inputs lack the axis of examples."""
    try:
        return find_layers(apply_fn, params, shapes)
    except Exception as error:  # whatever the network raises
        image = next(iter(batches if isinstance(batches, Sequence) else [batches]), None)
        shape = getattr(image, "shape", None)
        if shape is None or _takes(apply_fn, params, shapes):
            raise
        if _takes(apply_fn, params, jax.ShapeDtypeStruct((1, *shape), jnp.float32)):
            raise ValueError(
                f"`batches` must have a leading axis of examples; got images of shape {shape} "
                "without one. Stack them: np.stack(images), or image[None]."
            ) from error
        raise


def _takes(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any) -> bool:
    """Whether a network takes an input of these shapes."""
    try:
        jax.eval_shape(apply_fn, shapes_of(params), x)
    except Exception:  # whatever the network raises
        return False
    return True


def _example_axes(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    shapes: Any,
    network: Network,
    recipe: Recipe,
    is_wanted: bool,
) -> dict[str, ExampleAxes]:
    """The axes of the examples by layer; nothing if nobody wants them and no range needs them."""
    recipes = recipe.by_layer([site.layer.name for site in network.first_sites])
    by_example = [name for name, own in recipes.items() if own.has_ranges_per_example]
    if not by_example and not is_wanted:
        return {}
    found = example_axes(network, find_layers(apply_fn, params, with_one_more(shapes)))
    for name in by_example:
        if name not in found:
            raise ValueError(
                f"layer {name!r} cannot have granularity per_example: its examples have no axis of "
                "their own; use per_tensor there, by `overrides`."
            )
    return found


def reporter(
    progress: bool | Progress, stage: str = "quantizing"
) -> contextlib.AbstractContextManager[Progress]:
    """How progress is shown: by a bar, by a function, or not at all."""
    if progress is True:
        return progress_bar(stage)
    return contextlib.nullcontext(progress or (lambda item, done, total: None))


def _is_shape(batches: Any) -> bool:
    """Whether there are no images, but the shape of one."""
    leaves = jax.tree.leaves(batches) if isinstance(batches, Mapping) else [batches]
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _resized(change: Callable[[tuple[int, ...]], tuple[int, ...]], tree: Any) -> Any:
    """Shapes and types of arrays, the shapes changed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(change(leaf.shape), leaf.dtype), tree)


def _check_kinds(apply_fn: Any, params: Any, batches: Any, mesh: Any) -> None:
    """Refuses arguments of another kind than what they should be."""
    check_network(apply_fn, params)
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            "`mesh` must be a jax.sharding.Mesh, e.g. jax.make_mesh((8,), ('data',)); "
            f"got {mesh!r}."
        )
    if isinstance(batches, str | bytes):
        raise TypeError(f"`batches` must be arrays of images; got {batches!r}.")


def _check_data(
    batches: Any, mesh: jax.sharding.Mesh | None, input_range: tuple[float, float] | None
) -> None:
    """Refuses arguments that do not go together, with images or without."""
    if batches is None:
        raise ValueError(
            "`batches` is missing; pass calibration images or, to quantize without any, the shape "
            "of one: jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)."
        )
    if not _is_shape(batches):
        if input_range is not None:
            raise ValueError(
                f"`input_range` is for quantizing without images; got {input_range} and images, "
                "which show their range. Leave it out."
            )
        return
    if any(not leaf.shape for leaf in jax.tree.leaves(batches)):
        raise ValueError("`batches` must have a leading axis of examples; got a shape without one.")
    if mesh is not None:
        raise ValueError("`mesh` spreads calibration images, and `batches` has none; leave it out.")
    if input_range is not None and not (
        len(input_range) == 2 and -np.inf < input_range[0] < input_range[1] < np.inf
    ):
        raise ValueError(
            f"`input_range` must be two finite numbers, the smaller one first; got {input_range}."
        )


def _cut(total: int) -> Cut:
    """How images are cut into equal batches.

    No image counts twice: batches are made smaller, down to half, until they hold all images or
    leave the fewest out.
    """
    least = -(-total // BATCH_SIZE)
    count = min(range(least, 2 * least + 1), key=lambda count: (total % count, count))
    size = total // count
    if count * size < total:
        _logger.warning(
            "%d of %d calibration images are used: batches of equal size hold no more.",
            count * size,
            total,
        )
    return Cut(count, size)


Place = Callable[[Any, int], Any]


def _placing(size: int, mesh: jax.sharding.Mesh | None) -> tuple[jax.sharding.Mesh | None, Place]:
    """The devices that share a batch, as many as divide it, and what puts images on them.

    Args:
      size: images of a batch.
      mesh: the devices; None for the default one.

    Returns:
      The devices, and a function of (a pytree of arrays, the axis of its images).
    """
    if mesh is None:
        return None, lambda batch, axis: jax.tree.map(jnp.asarray, batch)
    is_spread = hosts.is_spread(mesh)
    groups = hosts.devices_by_process(mesh) if is_spread else [list(mesh.devices.flat)]
    most = len(groups[0])
    used = max((n for n in range(1, most + 1) if size % (n * len(groups)) == 0), default=0)
    if used < most:
        _logger.warning(
            "%s of %d devices are used: batches of %d images do not divide among more.",
            used * len(groups) or "the work of one",
            mesh.devices.size,
            size,
        )
    chosen = [device for group in groups for device in group[: used or most]]
    own = jax.sharding.Mesh(np.array(chosen), AXIS)

    def place(batch: Any, axis: int) -> Any:
        spec = jax.sharding.PartitionSpec(*[None] * axis, AXIS if used else None)
        if is_spread:
            return hosts.assembled(batch, own, spec)
        return jax.device_put(batch, jax.sharding.NamedSharding(own, spec))

    return own, place


def _read(images: Images, cut: Cut, place: Place, memory: Memory) -> list[Any]:
    """The leaves of an input: stacked on the devices, or to be read batch by batch."""
    if memory.store is None:
        parts = list(images.batches(cut.sizes))
        return jax.tree.leaves(place(jax.tree.map(lambda *leaves: np.stack(leaves), *parts), 1))
    leaves = Batches(images, cut, lambda batch: place(batch, 0)).leaves()
    if images.is_in_memory:
        return leaves
    return memory.store(lambda *values: values, leaves, len(leaves))


def _checkpoint(
    folder: str | os.PathLike[str], about: Mapping[str, Any], is_spread: bool
) -> Checkpoint:
    """The file of a run: one process of several writes it, and all of them read it."""
    if not is_spread:
        return Checkpoint(folder, about)
    found = hosts.together(lambda: Checkpoint(folder, about, hosts.is_first()))
    if len(set(hosts.gathered(found.done).ravel().tolist())) > 1:
        raise ValueError(
            "`checkpoint` must be a folder that all processes see, on a file system that they "
            f"share; in {folder} they find different files."
        )
    return found
