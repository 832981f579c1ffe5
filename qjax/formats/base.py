"""What a number format is: a map between codes and real values, as a pytree of arrays.

A format of a kernel has array leaves of rank 0 or 1, which hold for all of it (limits, a table of
levels), or of shape [groups or 1, patch groups, channels or 1, ...]: axis 1 is the patch axis,
split into blocks of elements that share their numbers. Whoever rounds element by element takes
`element` of it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

F = TypeVar("F")


@runtime_checkable
class Format(Protocol):
    """What the codes of one tensor stand for.

    Attributes:
      name: of its family in `FORMATS`.
      is_uniform: whether real = scale · (code − zero_point), so that sums of products of codes are
        integers times one scale.
    """

    name: ClassVar[str]
    is_uniform: ClassVar[bool]

    @property
    def bits(self) -> int:
        """The width of a code."""
        ...

    @property
    def dtype(self) -> Any:
        """The type that codes are stored in."""
        ...

    @property
    def lowest(self) -> Any:
        """The smallest code."""
        ...

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps real values to the nearest codes."""
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps codes to real values."""
        ...

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to representable ones; the gradient passes straight through."""
        ...

    def scaled(self, factor: jax.Array) -> "Format":
        """The format whose every value is `factor` times as large."""
        ...

    @property
    def step(self) -> jax.Array:
        """The real value of one unit of the scale, of the rank of the data."""
        ...


class Spec(Protocol):
    """What a format is made from: `qjax.QuantSpec`."""

    @property
    def bits(self) -> int:
        """The width of a code."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether codes are signed around 0."""
        ...

    @property
    def dtype(self) -> Any:
        """The type that codes are stored in."""
        ...


class NumberFormat(NamedTuple):
    """A family of formats, one for every range.

    Attributes:
      name: what a recipe calls it.
      type: the class of its formats, a dataclass that is a pytree.
      limits: of a spec: what depends on the width alone, a pytree of arrays. Widths whose limits
        have the same shapes share compiled programs.
      cover: of (low, high, spec, limits): the format that covers [low, high], arrays of one shape.
      is_uniform: see `Format`.
      widths: the bits that its codes can have.
      fit: of (values, weights, format): a better format for a kernel's values than the one that the
        search of its range found, see `qjax.formats.kmeans.lloyd`; None to keep that.
      refit: of (values, kernel, metric, format): the values with the same codes in the best format
        for these, and that format, see `qjax.formats.kmeans.refit`; None to fit the scale alone.
    """

    name: str
    type: type
    limits: Callable[[Any], Any]
    cover: Callable[..., Any]
    is_uniform: bool
    widths: range = range(1, 17)
    fit: Callable[..., Any] | None = None
    refit: Callable[..., Any] | None = None


def expand_groups(leaf: jax.Array, patch: int) -> jax.Array:
    """Repeats per-group numbers along the patch axis: [g, patch / size, ...] to [g, patch, ...]."""
    if leaf.ndim < 2 or leaf.shape[1] == 1:
        return leaf
    size = -(-patch // leaf.shape[1])
    return jnp.repeat(leaf, size, axis=1)[:, :patch]


def elementwise(format: F, patch: int) -> F:
    """The format of every element of a kernel of that patch size.

    Leaves have shape [groups or 1, patch or 1, channels or 1, ...], or rank below 2.
    """
    return jax.tree.map(lambda leaf: expand_groups(leaf, patch), format)


def element(format: F, k: Any) -> F:
    """The format of element `k` of the patch, from that of all elements: the patch axis is gone."""

    def pick(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        at = 0 if leaf.shape[1] == 1 else k
        return jax.lax.dynamic_index_in_dim(leaf, at, axis=1, keepdims=False)

    return jax.tree.map(pick, format)
