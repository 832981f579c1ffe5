"""Codes at their true width: two 4-bit codes to a byte, eight 3-bit codes to three bytes.

Codes become one dense stream of bits: the i-th code, counted from the smallest, takes the bits i·b
to i·b + b − 1, the lowest first.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.multiples import Multiples
from qjax.programs import program


@program(static_argnames=("bits", "step"))
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
    flags = (offsets >> jnp.arange(bits, dtype=jnp.int32)[None]) & 1
    return jnp.packbits(flags.astype(jnp.uint8).reshape(-1), bitorder="little")


def spacing(format: Any) -> int:
    """The difference between neighbouring codes of a format: 1 unless it says another."""
    return getattr(format, "spacing", 1)


def pack_kernel(codes: jax.Array, format: Any) -> jax.Array:
    """Joins codes to one stream of bits, those of `Multiples` as positions in their table.

    Args:
      codes: of any shape.
      format: their `Format`, not traced.

    Returns:
      uint8[ceil(codes.size · bits / 8)].
    """
    if isinstance(format, Multiples):
        return pack_codes(format.positions(codes), 0, format.bits)
    return pack_codes(codes, format.lowest, format.bits, spacing(format))


def unpack_kernel(stream: jax.Array, format: Any, bits: int, shape: Sequence[int]) -> jax.Array:
    """Cuts a stream of bits into codes; the inverse of `pack_kernel`.

    Args:
      stream: uint8[bytes].
      format: the `Format` of the codes.
      bits: its width, which is not known where the format is traced.
      shape: of the codes.
    """
    return codes_at(unpack_positions(stream, bits, tuple(shape)), format)


def codes_at(positions: jax.Array, format: Any) -> jax.Array:
    """The codes of a format by their positions, counted from the smallest."""
    if isinstance(format, Multiples):
        return format.at_positions(positions)
    return (positions * spacing(format) + format.lowest).astype(format.dtype)


@program(static_argnames=("bits", "shape"))
def unpack_positions(stream: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Cuts a stream of bits into positions of codes, counted from the smallest: int32.

    Args:
      stream: uint8[bytes], from `pack_codes`.
      bits: the width of a code.
      shape: of the result.

    Examples:
      >>> stream = pack_codes(jnp.array([1, -7, 3], jnp.int8), lowest=-7, bits=4)
      >>> unpack_positions(stream, 4, (3,)).tolist()
      [8, 0, 10]
    """
    flags = jnp.unpackbits(stream, count=math.prod(shape) * bits, bitorder="little")
    places = jnp.arange(bits, dtype=jnp.int32)[None]
    shifted = flags.reshape(-1, bits).astype(jnp.int32) << places
    return jnp.sum(shifted, axis=1, dtype=jnp.int32).reshape(shape)
