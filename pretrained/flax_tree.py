"""A tree of Flax variables out of tensors that another program named."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

STATISTICS = {"running_mean": "mean", "running_var": "var"}


def in_flax_layout(tensor: np.ndarray) -> np.ndarray:
    """A PyTorch tensor as Flax has it: kernels OIHW as HWIO, matrices transposed."""
    if tensor.ndim == 4:
        return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(tensor.T)


def variable(path: str, leaf: str) -> str:
    """The path of a PyTorch tensor among Flax variables.

    Args:
      path: of its module; the name of a batch norm begins with `bn`.
      leaf: its own name: weight, bias, running_mean or running_var.
    """
    if leaf in STATISTICS:
        return f"batch_stats/{path}/{STATISTICS[leaf]}"
    is_norm = "bn" in path.rpartition("/")[2]
    return f"params/{path}/{('scale' if is_norm else 'kernel') if leaf == 'weight' else leaf}"


def variables_of(model: nn.Module, leaves: Mapping[str, np.ndarray], channels: int) -> Any:
    """Makes a tree of leaves, if they are those of the module, in float32.

    Args:
      model: the module.
      leaves: by path.
      channels: of its images.

    Raises:
      ValueError: a leaf is missing, unknown, of another shape, or not of real numbers.
    """
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    expected: Any = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image), sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    wanted = {path: leaf.shape for path, leaf in expected.items()}
    wrong = {path for path in shapes.keys() | wanted if shapes.get(path) != wanted.get(path)}
    if wrong:
        path, description = min(wrong), " ".join(str(model).replace("# attributes", "").split())
        raise ValueError(
            f"`tensors` must hold the weights of {description}; at {path!r} expected "
            f"{wanted.get(path, 'nothing')}, got {shapes.get(path, 'nothing')}."
        )
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"`tensors` must be of real numbers; at {path!r} got {leaf.dtype}.")
    return unflatten_dict({path: np.float32(leaf) for path, leaf in leaves.items()}, sep="/")
