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

from qjax.fit.checkpoint import Checkpoint
from qjax.fit.data_free import fit_without_data
from qjax.fit.draws import EXAMPLES
from qjax.fit.ends import search_ends
from qjax.fit.equalize import equalize
from qjax.fit.junction import FittedMatmul
from qjax.fit.layerwise import calibrate
from qjax.fit.noise import noise_of
from qjax.fit.suitability import warn_of_few_images, warn_of_unlike_images
from qjax.graph.batch_norm import Statistics, output_statistics
from qjax.graph.examples import ExampleAxes, example_axes, with_one_more
from qjax.graph.fingerprint import digest, fingerprint
from qjax.graph.fold import fold
from qjax.graph.frameworks import check_network
from qjax.graph.junctions import find_junctions
from qjax.graph.layers import Network, check_layers, find_layers, shapes_of
from qjax.graph.matmuls import find_matmuls, left_in_float
from qjax.graph.naming import path_names
from qjax.graph.purity import check_pure
from qjax.graph.schedule import rest_of_params
from qjax.programs import FAST_TO_COMPILE
from qjax.progress import Progress, progress_bar
from qjax.recipe import Recipe
from qjax.recipe import recipe as make_recipe
from qjax.report import Report, layer_report, matmul_report, sum_report
from qjax.rescaled import rescaled
from qjax.run.function import QuantizedFunction
from qjax.run.tap import float_layers
from qjax.versions import versions

_logger = logging.getLogger(__name__)

BATCH_SIZE = 128  # calibration images that go through the network together


class Quantized(NamedTuple):
    """A quantized network.

    Attributes:
      apply_fn: a pure function of (params, x), compiled once per shape of x.
      params: `layers`, a `QuantizedLayer` by name; `rest`, the leaves of the float params that are
        still read, by path; `sums`, grids by name, where `Recipe.sums` is quantized; and `matmuls`,
        a `QuantizedMatmul` by name, where `Recipe.matmuls` is.
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
) -> Quantized:
    """Quantizes a pretrained network without retraining it.

    Args:
      apply_fn: a pure inference function of (params, x).
      params: pytree of arrays; for Flax Linen the whole dict of variables.
      batches: calibration inputs: one array float[N, ...] (or a mapping of arrays, for a network
        with several inputs), or any other iterable of such. They are held in memory and cut into
        batches of equal size, so the result does not depend on how the same images are handed over
        or on how many devices there are. Each image counts once; a few are left out, with a
        warning, where their number has no divisor that suits. Or, to quantize without a single
        image, the shape of an input as `jax.ShapeDtypeStruct`, whose leading axis may have any
        size: ranges of activations are then found at run time or from the statistics of batch norm,
        see `qjax.fit.data_free`.
      recipe: what to do; by default 8 bits everywhere.
      bits: short for `recipe=qjax.recipe(bits)`.
      mesh: devices to spread the calibration images over; as many of them as divide a batch.
      progress: whether to show a progress bar on standard error (needs rich), or a function to
        call with (layer name, layers done, layers).
      input_range: the least and the greatest value of the network's inputs; only without images.
      checkpoint: a folder for the layers that are finished, with images. Called again with the same
        arguments after it was killed, `quantize` goes on there and ends with the same result, bit
        for bit. What is finished stays in the folder: remove it once the result is saved.

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
    if checkpoint is not None and _is_shape(batches):
        raise ValueError(
            "`checkpoint` keeps layers that are fitted on images, and `batches` has none; leave it "
            "out."
        )
    check_finite("params", params)
    has_images = not _is_shape(batches)
    if has_images:
        images = gather(batches)
        check_finite("batches", images)
        stacked = _stack(images)
        shapes = _resized(lambda shape: shape[1:], stacked)
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
    with reporter(progress) as report_progress:
        folded = fold(network, leaves)
        sums, placed = {}, []
        if has_images:
            placed = jax.tree.leaves(_place(stacked, mesh))
            if recipe.equalize:
                folded = equalize(network, leaves, folded, placed)
            kept = None
            if checkpoint is not None:
                about = {
                    "function": fingerprint(network.flat),
                    "params": digest(params),
                    "images": digest(images),
                    "recipe": dataclasses.replace(recipe, end_search=0).to_json(),  # of layers
                    "versions": versions(),
                    "devices": sorted(device.device_kind for device in placed[0].devices()),
                }
                kept = Checkpoint(checkpoint, about)
            given = (placed, recipe, report_progress, examples, kept)
            fitted, sums = calibrate(network, leaves, folded, *given)
            warn_of_few_images(fitted)
            if not recipe.equalize:  # which changes what channels hold
                known = _statistics(network, leaves)
                warn_of_unlike_images(known, fitted, len(jax.tree.leaves(images)[0]))
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
        report = Report(
            records,
            recipe,
            left_in_float(network, {matmul.name for matmul in matmuls}),
            [sum_report(*item) for item in joined.items()],
            [matmul_report(*item) for item in matmuls.items()],
        )
        quantized = {
            "layers": jax.tree.map(jnp.asarray, {name: fit.layer for name, fit in fitted.items()}),
            "rest": jax.tree.map(jnp.copy, rest_of_params(network, params)),
        }
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
            noise = noise_of(network, floats, after, list(zip(*placed, strict=True)))
            quantized, report = after, rescaled(report, quantized, after, noise)
    kernel_shapes = {layer.name: layer.kernel_shape for layer in layers}
    function = QuantizedFunction(apply_fn, shapes_of(params), kernel_shapes, input=shapes)
    return Quantized(function, quantized, report)


def _statistics(network: Network, leaves: Sequence[Any]) -> dict[str, Statistics]:
    """What batch norm knows of the outputs of layers, by one program."""
    read = partial(output_statistics, network)
    if not jax.eval_shape(read, leaves):
        return {}
    return network.program("statistics", read, FAST_TO_COMPILE)(leaves)


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


def gather(batches: Any, argument: str = "batches") -> Any:
    """Joins batches to one pytree of arrays with a leading axis of all images.

    Args:
      batches: of images, as `quantize` takes them.
      argument: what its caller calls them.

    Raises:
      TypeError: they are no arrays.
      ValueError: they do not fit together, or there is none.
    """
    is_one = isinstance(batches, Mapping) or hasattr(batches, "shape")
    parts = [batches] if is_one else list(batches)
    if not parts:
        raise ValueError(f"`{argument}` is empty; pass at least one image.")
    _check_parts(parts, argument)
    images = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(x) for x in leaves]), *parts)
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(images)}
    if len(sizes) != 1:
        raise ValueError(
            f"every array in `{argument}` must have the same leading axis of examples; got "
            f"{sorted(sizes)} of them."
        )
    if sizes == {0}:
        raise ValueError(f"`{argument}` holds no image; pass at least one.")
    return images


def _check_parts(parts: Sequence[Any], argument: str) -> None:
    """Refuses batches that are no arrays of examples, or whose examples have several shapes."""
    for part in parts:
        for leaf in part.values() if isinstance(part, Mapping) else [part]:
            if not getattr(leaf, "shape", None):
                found = f"a {type(part).__name__} of {len(part)}" if isinstance(part, tuple) else ""
                raise TypeError(
                    "every batch must be an array of images, or a mapping of arrays; got "
                    f"{found or type(leaf).__name__}. Of (image, label) pairs pass the images "
                    "alone: (x for x, _ in batches)."
                )
    kinds = {str(jax.tree.map(lambda leaf: leaf.shape[1:], part)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            "every batch must have images of the same shape; got "
            f"{' and '.join(sorted(kinds))}. If `{argument}` is (images, labels), pass images "
            "alone."
        )


def check_finite(argument: str, tree: Any) -> None:
    """Refuses arrays with NaN or infinity."""
    for path, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_float and not np.all(np.isfinite(np.asarray(leaf, np.float32))):
            where = f" at {path!r}" if path else ""
            raise ValueError(
                f"`{argument}` must be finite; found NaN or infinity{where}. Check how it was made."
            )


def _stack(images: Any) -> Any:
    """Cuts images into equal batches, [batches, examples, ...].

    No image counts twice: batches are made smaller, down to half, until they hold all images or
    leave the fewest out.
    """
    total = len(jax.tree.leaves(images)[0])
    least = -(-total // BATCH_SIZE)
    count = min(range(least, 2 * least + 1), key=lambda count: (total % count, count))
    size = total // count
    if count * size < total:
        _logger.warning(
            "%d of %d calibration images are used: batches of equal size hold no more.",
            count * size,
            total,
        )
    return jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), images)


def _place(stacked: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Puts batches on the devices, on as many as divide them."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, stacked)
    size, devices = jax.tree.leaves(stacked)[0].shape[1], mesh.devices.size
    used = max(count for count in range(1, devices + 1) if size % count == 0)
    if used < devices:
        _logger.warning(
            "%d of %d devices are used: batches of %d images do not divide among more.",
            used,
            devices,
            size,
        )
    own = jax.sharding.Mesh(mesh.devices.ravel()[:used], "images")
    spec = jax.sharding.PartitionSpec(None, "images")
    return jax.device_put(stacked, jax.sharding.NamedSharding(own, spec))
