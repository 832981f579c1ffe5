"""Fitting a whole network, on images or without: from a traced network to what its layers get."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import hosts
from qjax.fit.data_free import fit_without_data
from qjax.fit.equalize import equalize
from qjax.fit.estimate import choose
from qjax.fit.held_out import FEW_IMAGES
from qjax.fit.images import Cut, Images
from qjax.fit.junction import FittedJunction, FittedMatmul
from qjax.fit.layer import Fit
from qjax.fit.layerwise import calibrate, streams_of
from qjax.fit.search import Candidates
from qjax.fit.suitability import warn_of_few_images, warn_of_unlike_images
from qjax.fit.table import FittedTable, fit_table
from qjax.graph.batch_norm import Statistics, output_statistics
from qjax.graph.examples import ExampleAxes
from qjax.graph.fingerprint import digest, fingerprint
from qjax.graph.fold import Folded, fold
from qjax.graph.junctions import Junction, find_junctions
from qjax.graph.layers import Network
from qjax.graph.matmuls import Matmul, find_matmuls
from qjax.graph.tables import Table, find_tables, names_of_others
from qjax.placing import checkpoint_of, placing, read
from qjax.programs import FAST_TO_COMPILE
from qjax.progress import Progress
from qjax.recipe import Recipe
from qjax.sharing import sharing
from qjax.versions import versions


class Job(NamedTuple):
    """What fitting takes.

    Attributes:
      network: traced at the size of a batch.
      params: its params.
      recipe: what to do.
      examples: the axes of the examples by layer, where ranges are those of examples.
      progress: called with (layer name, layers done, layers).
    """

    network: Network
    params: Any
    recipe: Recipe
    examples: dict[str, ExampleAxes]
    progress: Progress


class Fitted(NamedTuple):
    """What fitting gives.

    Attributes:
      layers: a `Fit` by name, in dataflow order.
      sums: the junctions, and the operands and results of matmuls, by name.
      tables: those that are codes.
      folded: kernel and bias of each layer in float.
      placed: the leaves of an input, as fitting read them; none without images.
    """

    layers: dict[str, Fit]
    sums: dict[str, FittedJunction]
    tables: dict[Table, FittedTable]
    folded: Sequence[Folded]
    placed: Sequence[Any]

    def junctions(self, job: Job) -> dict[Junction, FittedJunction]:
        """Those that have a grid of their own."""
        found = find_junctions(job.network) if job.recipe.quantizes_sums else ()
        return {each: self.sums[each.name] for each in found if each.name in self.sums}

    def matmuls(self, job: Job) -> dict[Matmul, FittedMatmul]:
        """The quantized products of two activations."""
        found = find_matmuls(job.network) if job.recipe.quantizes_matmuls else ()
        pairs = ((each, FittedMatmul.found(each.name, self.sums)) for each in found)
        return {each: fitted for each, fitted in pairs if fitted is not None}


def fit_without_images(job: Job, input_range: tuple[float, float] | None) -> Fitted:
    """Fits every layer by what its params tell; see `qjax.fit.data_free`."""
    leaves = jax.tree.leaves(job.params)
    folded = fold(job.network, leaves)
    given = (job.recipe, job.progress, job.examples, input_range)
    layers = fit_without_data(job.network, leaves, folded, *given)
    return Fitted(layers, {}, _fit_tables(job), folded, [])


def fit_on_images(
    job: Job,
    images: Images,
    cut: Cut,
    mesh: jax.sharding.Mesh | None,
    memory: str | None,
    checkpoint: str | os.PathLike[str] | None,
) -> Fitted:
    """Fits every layer on images.

    Args:
      job: what to do.
      images: to calibrate on.
      cut: how they are cut into batches.
      mesh: the devices; None for the default one.
      memory: where the values between layers are kept; None for the first place where they fit.
      checkpoint: the folder for what is finished; None for no such.
    """
    network, recipe, leaves = job.network, job.recipe, jax.tree.leaves(job.params)
    own, place = placing(cut.size, mesh)
    is_spread = own is not None and hosts.is_spread(own)
    devices = list(jnp.zeros(()).devices()) if own is None else list(own.local_devices)
    processes = jax.process_count() if is_spread else 1
    chosen = choose(memory, network, recipe, cut.count, devices, processes)
    placed = read(images, cut, place, chosen)
    whole = partial(hosts.on_every, mesh=own) if own is not None and is_spread else None
    folded = fold(network, leaves)
    if recipe.equalize:
        floats = streams_of(network, leaves, placed, False, chosen)
        folded = equalize(network, folded, floats)
        folded = folded if whole is None else whole(folded)
    kept = None
    if checkpoint is not None:
        about = {
            "function": fingerprint(network.flat),
            "params": digest(job.params),
            "images": images.digest,
            "recipe": dataclasses.replace(recipe, end_search=0).to_json(),  # of layers
            "versions": versions(),
            "devices": sorted(device.device_kind for device in devices),
        }
        kept = checkpoint_of(checkpoint, about, is_spread)
    tables = _fit_tables(job)
    held = {table.var: fit.values(table) for table, fit in tables.items()}
    count = cut.count * cut.size
    given = (placed, recipe, job.progress, job.examples, kept, chosen, whole, held)
    with sharing(own):
        layers, sums = calibrate(network, leaves, folded, *given, count < FEW_IMAGES)
    warn_of_few_images(layers)
    if not recipe.equalize:  # which changes what channels hold
        warn_of_unlike_images(_statistics(network, leaves), layers, count)
    return Fitted(layers, sums, tables, folded, placed)


def _statistics(network: Network, leaves: Sequence[Any]) -> dict[str, Statistics]:
    """What batch norm knows of the outputs of layers, by one program."""
    read = partial(output_statistics, network)
    if not jax.eval_shape(read, leaves):
        return {}
    return network.program("statistics", read, FAST_TO_COMPILE)(leaves)


def _fit_tables(job: Job) -> dict[Table, FittedTable]:
    """Rounds the params that the input picks from, where the recipe says so."""
    network, recipe = job.network, job.recipe
    tables = find_tables(network) if recipe.quantizes_tables else ()
    names = [site.layer.name for site in network.first_sites]
    recipes = recipe.by_layer(names, names_of_others(network, recipe))
    values = dict(zip(network.flat.params, jax.tree.leaves(job.params), strict=True))
    candidates = Candidates(recipe.grid_size, recipe.refinements)
    return {
        table: fit_table(table, jnp.asarray(values[table.var]), own, candidates)
        for table in tables
        if (own := recipes[table.name]).weights is not None
    }
