"""Codes at their true width: two 4-bit codes to a byte, eight 3-bit codes to three bytes.

Codes become one dense stream of bits: the i-th code, counted from the smallest, takes the bits i·b
to i·b + b − 1, the lowest first.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def pack_codes(codes: jax.Array, lowest: int | jax.Array, bits: int, step: int = 1) -> jax.Array:
    """Joins codes to one stream of bits.

    Args:
      codes: integers `lowest + i · step`, 0 ≤ i < 2^bits, of any shape.
      lowest: the smallest code.
      bits: their width.
      step: the difference between neighbouring codes.

    Returns:
      uint8[ceil(codes.size · bits / 8)].
    """
    offsets = (codes.astype(jnp.int32).reshape(-1, 1) - lowest) // step
    flags = (offsets >> jnp.arange(bits)[None]) & 1
    return jnp.packbits(flags.astype(jnp.uint8).reshape(-1), bitorder="little")


def spacing(format: Any) -> int:
    """The difference between neighbouring codes of a format: 1 unless it says another."""
    return getattr(format, "spacing", 1)


def unpack_codes(
    stream: jax.Array,
    lowest: int | jax.Array,
    bits: int,
    dtype: Any,
    shape: Sequence[int],
    step: int = 1,
) -> jax.Array:
    """Cuts a stream of bits into codes; the inverse of `pack_codes`.

    Args:
      stream: uint8[bytes].
      lowest: the smallest code.
      bits: their width.
      dtype: the type of the result.
      shape: of the codes.
      step: the difference between neighbouring codes.

    Returns:
      Integers of that type and shape.
    """
    flags = jnp.unpackbits(stream, count=math.prod(shape) * bits, bitorder="little")
    offsets = jnp.sum(flags.reshape(-1, bits).astype(jnp.int32) << jnp.arange(bits)[None], axis=1)
    return (offsets * step + lowest).astype(dtype).reshape(shape)
