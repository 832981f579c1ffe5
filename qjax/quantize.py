"""The function transformation: a float network in, a quantized one out."""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import hosts
from qjax.calibration import Fitted, Job, fit_on_images, fit_without_images
from qjax.checks import check_arguments, is_shape
from qjax.fit import ends
from qjax.fit.draws import EXAMPLES
from qjax.fit.images import Cut, check_finite
from qjax.fit.kept_state import KeptState
from qjax.fit.layer import Fit
from qjax.fit.memory import batch_of
from qjax.fit.noise import noise_of
from qjax.graph.examples import ExampleAxes, example_axes, with_one_more
from qjax.graph.layers import Network, check_layers, find_layers, shapes_of
from qjax.graph.matmuls import left_in_float
from qjax.graph.purity import check_pure
from qjax.graph.schedule import rest_of_params
from qjax.graph.tables import without_lookups
from qjax.placing import (
    batch_shapes,
    cut_of,
    narrowed,
    shared_images,
    warn_of_images_left_out,
)
from qjax.progress import Progress, progress_bar
from qjax.recipe import Recipe
from qjax.recipe import recipe as make_recipe
from qjax.report import Report, layer_report, matmul_report, sum_report, table_report
from qjax.rescaled import rescaled
from qjax.run.function import QuantizedFunction
from qjax.run.tap import float_layers

_logger = logging.getLogger(__name__)


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
    check_arguments(apply_fn, params, batches, recipe, mesh, input_range, checkpoint, memory)
    is_spread = hosts.is_spread(mesh)
    if mesh is not None and is_spread:
        params = hosts.on_this(params, mesh)
    check_finite("params", params)
    images, cut = None, Cut(1, EXAMPLES)
    if is_shape(batches):
        recipe = recipe.without_data()
        shapes = _resized(lambda shape: (EXAMPLES, *shape[1:]), batches)
        network = _traced(apply_fn, params, shapes, batches)
    else:
        images = shared_images(batches, is_spread)
        cut = cut_of(images.total)
        shapes = batch_shapes(images, cut)
        network = _traced(apply_fn, params, shapes, batches)
        narrow = narrowed(cut, images.total, network, recipe)
        if narrow != cut:
            cut, shapes = narrow, batch_shapes(images, narrow)
            network = _traced(apply_fn, params, shapes, batches)
        warn_of_images_left_out(cut, images.total)
    check_layers(network)
    check_pure(apply_fn, shapes_of(params), shapes, network)
    examples = _example_axes(apply_fn, params, shapes, network, recipe, images is None)
    with reporter(progress if hosts.is_first() or not is_spread else False) as report_progress:
        job = Job(network, params, recipe, examples, report_progress)
        if images is None:
            fitted = fit_without_images(job, input_range)
        else:
            fitted = fit_on_images(job, images, cut, mesh, memory, checkpoint)
        _warn_of_raised_scales(fitted.layers)
        quantized, report = _params_of(job, fitted), _report_of(job, fitted)
        if images is not None and recipe.end_search:
            kept = None
            if checkpoint is not None:
                about = network, params, quantized, images.digest, recipe.end_search
                kept = KeptState(checkpoint, ends.FILE, *about)
            quantized, report = _searched_by_the_end(job, fitted, cut, quantized, report, kept)
    kernel_shapes = {site.layer.name: site.layer.kernel_shape for site in network.first_sites}
    function = QuantizedFunction(apply_fn, shapes_of(params), kernel_shapes, input=shapes)
    return Quantized(function, quantized, report)


def _warn_of_raised_scales(layers: Mapping[str, Fit]) -> None:
    for name, fit in layers.items():
        if raised := int(fit.raised):
            _logger.warning(
                "layer %r: the scales of %d channels of weights are raised, as their biases would "
                "leave 32 bits.",
                name,
                raised,
            )


def _params_of(job: Job, fitted: Fitted) -> dict[str, Any]:
    """`Quantized.params`."""
    tables = {table.name: fit.quantized for table, fit in fitted.tables.items()}
    rest = rest_of_params(job.network, job.params)
    others = {
        "sums": {each.name: fit.grid for each, fit in fitted.junctions(job).items()},
        "matmuls": {each.name: fit.quantized for each, fit in fitted.matmuls(job).items()},
        "tables": tables,
    }
    found = {
        "layers": {name: fit.layer for name, fit in fitted.layers.items()},
        "rest": {path: jnp.copy(leaf) for path, leaf in rest.items() if path not in tables},
    }
    return jax.tree.map(jnp.asarray, found | {name: own for name, own in others.items() if own})


def _report_of(job: Job, fitted: Fitted) -> Report:
    network, matmuls = job.network, fitted.matmuls(job)
    layers = [site.layer for site in network.first_sites]
    in_float = left_in_float(network, {matmul.name for matmul in matmuls})
    return Report(
        [layer_report(layer, fitted.layers[layer.name]) for layer in layers],
        job.recipe,
        without_lookups(network, in_float, {table.name for table in fitted.tables}),
        [sum_report(*item) for item in fitted.junctions(job).items()],
        [matmul_report(*item) for item in matmuls.items()],
        [table_report(*item) for item in fitted.tables.items()],
    )


def _searched_by_the_end(
    job: Job,
    fitted: Fitted,
    cut: Cut,
    before: dict[str, Any],
    report: Report,
    kept: KeptState | None,
) -> tuple[dict[str, Any], Report]:
    """Params and report after the search of ranges by the output of the whole network."""
    floats = float_layers(job.network, job.params, fitted.folded)
    given = (fitted.placed, job.recipe.end_search, job.progress, kept)
    after = ends.search_ends(job.network, floats, before, *given)
    batches = (batch_of(fitted.placed, number) for number in range(cut.count))
    noise = noise_of(job.network, floats, after, batches)
    return after, rescaled(report, before, after, noise)


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


def _resized(change: Callable[[tuple[int, ...]], tuple[int, ...]], tree: Any) -> Any:
    """Shapes and types of arrays, the shapes changed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(change(leaf.shape), leaf.dtype), tree)
