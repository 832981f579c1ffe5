"""Values between layers as integers: codes on a layer's grid, or the wide integers of a sum.

Sums of values need a finer grid than codes. In integer arithmetics they are int32 with |v| ≤ 2^30
and zero_point 0: the operands of a sum, with scales s_i and |q_i − z_i| ≤ L_i, go to the grid
s = Σ s_i·L_i / 2^30, v = Σ (q_i − z_i)·s_i / s, each term requantized in the same arithmetic. In an
arithmetic of shifts s is the next power of two, so that terms whose scales are powers of two are
shifted to the left and lose nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams, cast, quantize_array
from qjax.formats.dynamic import ActivationFormat
from qjax.formats.scales import power_of_two_above
from qjax.graph import jaxpr
from qjax.integer.lowerings import signed
from qjax.integer.requantize import Arithmetic

WIDE = 2**30  # the greatest magnitude of a sum


class GridKey(NamedTuple):
    """What tells one grid of codes from another, as numbers: hashable.

    Attributes:
      scales: of its channels, or one.
      zero_points: of its channels, or one.
      qmin: the smallest code.
      qmax: the largest code.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    qmin: int
    qmax: int

    @property
    def greatest(self) -> float:
        """The greatest real value on the grid, of all channels."""
        above = self.qmax - np.asarray(self.zero_points)
        return float(np.max(np.asarray(self.scales, np.float32) * above.astype(np.float32)))


def grid_key(format: ActivationFormat | None) -> GridKey | None:
    """The key of the grid of a tensor, from a format that is not traced; None if it has no one."""
    if not isinstance(format, QParams):
        return None
    scale, zero_point = (np.ravel(leaf) for leaf in (format.scale, format.zero_point))
    limits = int(format.qmin), int(format.qmax)
    return GridKey(tuple(map(float, scale)), tuple(map(int, zero_point)), *limits)


class Codes(NamedTuple):
    """Integers that stand for real values: real = scale · (codes − zero_point).

    Attributes:
      codes: int8, int16 or int32, stored around 0.
      scale: float32, real units per code: a scalar; per channel where only a sum or one layer
        reads the codes.
      zero_point: int32, the code of real 0.
      limit: what no |codes − zero_point| exceeds.
      key: of the grid of a layer's input or output, None for a sum.
      greatest: what no magnitude of the values exceeds, in real units; None for scale · limit.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    limit: int
    key: GridKey | None
    greatest: jax.Array | None = None

    @property
    def real(self) -> jax.Array:
        """The values in float32."""
        return self.scale * self.centered.astype(jnp.float32)

    @property
    def centered(self) -> jax.Array:
        """Codes less the zero point, int32."""
        return self.codes.astype(jnp.int32) - self.zero_point

    @property
    def exact(self) -> "Codes":
        """The same values as integers with zero_point 0, as a sum has them."""
        zero = jnp.zeros_like(self.zero_point)
        return self._replace(codes=self.centered, zero_point=zero, key=None)

    def replace(self, codes: jax.Array) -> "Codes":
        """Other codes on the same grid."""
        return self._replace(codes=codes)


def real_value(value: Any, atom: jaxpr.Atom) -> Any:
    """A value in real units, of the type that its readers expect."""
    return cast(value.real, jaxpr.dtype(atom)) if isinstance(value, Codes) else value


def stored(qparams: QParams, key: GridKey) -> QParams:
    """A grid as its codes are stored, see `signed`, its integers known to the compiler.

    Its scales are not: a compiler joins factors that it knows, and rounds the product otherwise.

    Args:
      qparams: the grid.
      key: of it.
    """
    zero_point = np.reshape(np.asarray(key.zero_points, np.int32), qparams.zero_point.shape)
    limits = np.int32(key.qmin), np.int32(key.qmax)
    return signed(QParams(qparams.scale, jnp.asarray(zero_point), *limits, qparams.dtype))


def on_grid(codes: jax.Array, qparams: QParams, key: GridKey) -> Codes:
    """Codes of a layer's input or output.

    Args:
      codes: as they are stored, see `stored`.
      qparams: their grid as they are stored.
      key: of that grid.
    """
    return Codes(codes, qparams.scale, qparams.zero_point, key.qmax - key.qmin, key)


def held(value: Codes, qparams: QParams, dtype: Any, arithmetic: Arithmetic) -> Codes:
    """The codes of what a type of few bits holds of a value, as fake quantization passes it on.

    Args:
      value: `Codes` of a layer's output.
      qparams: their grid.
      dtype: that the network gives the value.
      arithmetic: of requantization; those of integers alone round nothing.
    """
    if arithmetic.only_integers or value.limit < 2 ** jnp.finfo(dtype).nmant:
        return value
    return value.replace(quantize_array(cast(value.real, dtype), signed(qparams)))


def to_grid(
    value: Any, qparams: QParams, key: GridKey, arithmetic: Arithmetic, dtype: Any
) -> Codes:
    """Brings a value to the codes of a layer's input or output.

    Args:
      value: `Codes` or real values.
      qparams: the grid.
      key: of the grid.
      arithmetic: of requantization.
      dtype: that the network gives the value.
    """
    if isinstance(value, Codes) and value.key == key:
        return value
    qparams = stored(qparams, key)
    if isinstance(value, Codes) and arithmetic.only_integers:
        codes = arithmetic.to_codes(value.centered, value.scale / qparams.scale, qparams)
    else:
        real = cast(value.real, dtype) if isinstance(value, Codes) else value
        codes = quantize_array(real, qparams)
    return on_grid(codes, qparams, key)


def wide_scale(greatest: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """The scale of a sum whose magnitude is at most `greatest`, in real units."""
    scale = greatest / WIDE
    return power_of_two_above(scale) if arithmetic.only_shifts else scale


def of_sum(codes: jax.Array, scale: jax.Array, limit: int = WIDE) -> Codes:
    """Integers with zero_point 0 that are no codes of a layer.

    Args:
      codes: int32[...].
      scale: float32, real units per code.
      limit: their greatest magnitude.
    """
    return Codes(codes, scale, jnp.zeros((), jnp.int32), limit, None)


def rescaled(value: Codes, scale: jax.Array, arithmetic: Arithmetic, limit: int = WIDE) -> Codes:
    """Requantizes a value to integers of another scale.

    Args:
      value: `Codes`.
      scale: float32 scalar, real units per integer of the result.
      arithmetic: of requantization.
      limit: what no integer of the result exceeds in magnitude.
    """
    codes = arithmetic.requantize(value.centered, value.scale / scale)
    return of_sum(codes, scale, limit)


def requantized(
    acc: jax.Array,
    unit: jax.Array,
    outputs: QParams | None,
    key: GridKey | None,
    limit: int,
    dtype: Any,
    arithmetic: Arithmetic,
    multiplier: jax.Array | None = None,
) -> Codes | jax.Array:
    """Requantizes an accumulator to codes, or to a sum.

    Args:
      acc: the accumulator.
      unit: float32, the real value of one unit of it: a scalar, or along its channels.
      outputs: the grid of the codes, None for a sum.
      key: of that grid.
      limit: the greatest magnitude of the accumulator; read for a sum alone.
      dtype: that the network gives the result.
      arithmetic: of requantization.
      multiplier: M, where it is known: the unit in codes of the output.

    Returns:
      `Codes`; float32 in real units for a sum in an arithmetic that has sums in float32.
    """
    if outputs is not None and key is not None:
        qparams = stored(outputs, key)
        multiplier = unit * qparams.inverse_scale if multiplier is None else multiplier
        codes = arithmetic.to_codes(acc, multiplier, qparams)
        return held(on_grid(codes, qparams, key), outputs, dtype, arithmetic)
    if not arithmetic.only_integers:
        return acc.astype(jnp.float32) * unit
    wide = wide_scale(jnp.max(unit) * float(limit), arithmetic)
    return of_sum(arithmetic.requantize(acc, unit * (1 / wide)), wide)


def for_sum(values: Sequence[Codes], arithmetic: Arithmetic) -> list[Codes]:
    """Brings values to one grid that holds their sum."""
    ranges = _ranges(values)
    return _within(sum(ranges[1:], ranges[0]), values, arithmetic)


def for_union(values: Sequence[Codes], arithmetic: Arithmetic) -> list[Codes]:
    """Brings values to one grid that holds each of them."""
    return _within(jnp.max(jnp.stack(_ranges(values))), values, arithmetic)


def _within(greatest: jax.Array, values: Sequence[Codes], arithmetic: Arithmetic) -> list[Codes]:
    """Brings values to the grid of a sum that is at most `greatest`."""
    scale = wide_scale(greatest, arithmetic)
    found = (rescaled(value, scale, arithmetic) for value in values)
    return [value._replace(greatest=greatest) for value in found]


def _ranges(values: Sequence[Codes]) -> list[jax.Array]:
    """The greatest magnitude that each value can have, in real units."""
    return [
        jnp.max(value.scale) * float(value.limit) if value.greatest is None else value.greatest
        for value in values
    ]
