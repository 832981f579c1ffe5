"""What a range objective is, and what it sees of a tensor."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

Range = tuple[jax.Array, jax.Array]


class Sample(Protocol):
    """A tensor whose range is to be chosen, as an objective sees it.

    A range has one shape everywhere: [] for all of an activation, that of the scales for a kernel.
    """

    @property
    def values(self) -> jax.Array:
        """What is to be rounded."""
        ...

    @property
    def target(self) -> jax.Array:
        """What it should be afterwards."""
        ...

    @property
    def unit(self) -> Any:
        """The power of two that errors are divided by before they are squared."""
        ...

    def total(self, errors: jax.Array) -> jax.Array:
        """Sums (or averages) something of the shape of `values` to the shape of a range."""
        ...

    def extremes(self) -> Range:
        """The least and the greatest value."""
        ...

    def central(self, percent: float) -> Range:
        """The range that holds this share of the values."""
        ...

    def output_error(self, values_hat: jax.Array) -> jax.Array:
        """The mean squared error of the layer's output with these values, of a range's shape."""
        ...

    def distribution(self) -> tuple[jax.Array, jax.Array]:
        """(counts, centers) of a histogram of the values."""
        ...


class Objective(NamedTuple):
    """A way to choose clipping ranges.

    Attributes:
      name: what a recipe calls it.
      label: what it measures, in a few words.
      per_channel: whether a channel alone has values enough for it; otherwise one share of the
        extremes is searched for all scales of a kernel, and activations have one range per tensor.
      extremes: of a sample: the widest range to consider.
      loss: of (sample, format): what the range minimizes, of the shape of the range; None for the
        extremes themselves.
      sees_output: whether it knows what the layer does with the values, its activation included.
      for_logits: what takes its place where the values are logits of classes; None for itself.
      is_rugged: whether the loss has many local minima, so that every pair of candidates for the
        two ends of a range is tried rather than one end after the other.
    """

    name: str
    label: str
    per_channel: bool
    extremes: Callable[[Any], Range]
    loss: Callable[[Any, Any], jax.Array] | None
    sees_output: bool = False
    for_logits: Any = None
    is_rugged: bool = False
