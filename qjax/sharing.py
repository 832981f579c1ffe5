"""Sharing work that is not the images' own: patches, samples, output channels.

Within `sharing(mesh)` the programs that fit layers spread such axes over the devices.
"""

import contextlib

import jax
from jax.sharding import Mesh, PartitionSpec

AXIS = "images"


def sharing(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """A context in which `shared` spreads axes over a mesh; None, or one device, spreads nothing.

    Args:
      mesh: of one axis, `images`.
    """
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def shared(values: jax.Array, axis: int = 0, *, is_returned: bool) -> jax.Array:
    """Spreads an axis of values over the devices of the context, within a compiled function.

    Args:
      values: [...].
      axis: patches, samples or channels.
      is_returned: whether the function may return them so; then an axis that does not divide among
        the devices stays whole, as JAX has no such arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or (is_returned and values.shape[axis] % mesh.size):
        return values
    spec = PartitionSpec(*[None] * axis, AXIS)
    return jax.lax.with_sharding_constraint(values, spec)
