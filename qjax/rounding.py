"""Rounding a kernel to codes, once its scales are chosen."""

import jax

from qjax.affine import QParams, quantize_array
from qjax.search import join_patch, split_patch


def round_nearest(kernel: jax.Array, qparams: QParams) -> jax.Array:
    """Rounds every element to its nearest code, half to even.

    Args:
      kernel: float[groups, patch, channels].
      qparams: of shape [groups or 1, patch groups, channels or 1].

    Returns:
      Codes of the kernel's shape.
    """
    blocks = split_patch(kernel, qparams.scale.shape[1])
    per_block = jax.tree.map(lambda leaf: leaf[:, :, None], qparams)
    return join_patch(quantize_array(blocks, per_block), kernel.shape[1])
