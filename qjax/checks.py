"""What `qjax.quantize` refuses before any work: arguments of another kind, or that contradict."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qjax import hosts
from qjax.fit.estimate import check_memory
from qjax.graph.frameworks import check_network
from qjax.recipe import Recipe


def check_arguments(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    recipe: Recipe,
    mesh: jax.sharding.Mesh | None,
    input_range: tuple[float, float] | None,
    checkpoint: str | os.PathLike[str] | None,
    memory: str | None,
) -> None:
    """Refuses arguments of `qjax.quantize` that cannot be meant.

    Raises:
      ValueError: they contradict each other.
      TypeError: one is of another kind than what it should be.
    """
    _check_kinds(apply_fn, params, batches, recipe, mesh)
    _check_data(batches, mesh, input_range)
    check_memory(memory)
    if is_shape(batches):
        _check_without_images(recipe, checkpoint, memory)
    if mesh is not None and hosts.is_spread(mesh):
        hosts.check_mesh(mesh)
        if recipe.end_search:
            raise ValueError(
                "`end_search` looks at the whole network in one process, and `mesh` has devices of "
                "several; quantize with end_search=0, or in one process."
            )


def is_shape(batches: Any) -> bool:
    """Whether there are no images, but the shape of one."""
    leaves = jax.tree.leaves(batches) if isinstance(batches, Mapping) else [batches]
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _check_kinds(apply_fn: Any, params: Any, batches: Any, recipe: Any, mesh: Any) -> None:
    """Refuses arguments of another kind than what they should be."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a qjax.Recipe; got {type(recipe).__name__}.")
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
    if not is_shape(batches):
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


def _check_without_images(recipe: Recipe, checkpoint: Any, memory: str | None) -> None:
    """Refuses what needs images, where there are none."""
    given = {"checkpoint": checkpoint, "memory": memory}
    for argument, use in (("checkpoint", "layers that are fitted"), ("memory", "what is fitted")):
        if given[argument] is not None:
            raise ValueError(
                f"`{argument}` keeps {use} on images, and `batches` has none; leave it out."
            )
    if recipe.quantizes_sums:
        raise ValueError(
            "`sums` quantized needs the values of sums, and `batches` has no images; pass images, "
            "or leave the sums in float."
        )
    if recipe.quantizes_matmuls:
        raise ValueError(
            "`matmuls` quantized needs the values of their operands, and `batches` has no images; "
            "pass images, or leave the matmuls in float."
        )
