"""The format of an activation whose range is found at run time, by what the tensor holds then.

The range is that of the extremes, of a whole batch or of every example by itself:
scale = (max x − min x) / (2^b − 1) for asymmetric codes, max |x| / (2^(b−1) − 1) for symmetric
ones, 0 always exact. Nothing is clipped, nothing is searched, and no calibration image is needed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.affine import QParams, with_exact_products
from qjax.formats.spec import QuantSpec
from qjax.pytree import pytree

Bounds = tuple[float, float]
EVERYTHING: Bounds = (-math.inf, math.inf)


@pytree
@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A range of its own for every tensor, or for every example in it.

    Attributes:
      qmin: smallest code, inclusive, an int32 scalar.
      qmax: largest code, inclusive, an int32 scalar.
      spec: the number format, its width left out (static).
      axis: of the examples; None for one range of the whole tensor (static).
      bounds: what a range is cut to, as by the activation that follows (static).

    Examples:
      >>> spec = QuantSpec(8, symmetric=False, granularity="per_example", ranges="dynamic")
      >>> format = dynamic(spec, spec.limits, axis=0)
      >>> print(format.at(jnp.array([[0.0, 255.0], [-51.0, 12.75]])).scale)
      [[1.  ]
       [0.25]]
    """

    qmin: Any
    qmax: Any
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(default=None, metadata={"static": True})
    bounds: Bounds = dataclasses.field(default=EVERYTHING, metadata={"static": True})

    name: ClassVar[str] = "dynamic"
    is_uniform: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        """The width of a code; not under `jax.jit`, where the limits are traced."""
        return (int(self.qmax) - int(self.qmin)).bit_length()

    @property
    def dtype(self) -> Any:
        """The type that codes are stored in."""
        return self.spec.dtype

    def at(self, x: jax.Array) -> QParams:
        """The grid of codes for the values of a tensor; what is not finite does not count.

        Args:
          x: float[...].

        Returns:
          Qparams: scalars, or of the rank of `x` with 1 on every axis but that of the examples. No
          gradient passes through them.
        """
        axes, keeps = None, self.axis is not None
        if self.axis is not None:
            axes = tuple(axis for axis in range(x.ndim) if axis != self.axis)
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        ends = (end(x, axis=axes, keepdims=keeps) for end in (jnp.min, jnp.max))
        low, high = (jnp.clip(end, *self.bounds) for end in ends)
        return with_exact_products(self.spec.cover(low, high, (self.qmin, self.qmax)))

    def project(self, x: jax.Array) -> jax.Array:
        """Rounds real values to representable ones; the gradient passes straight through."""
        return self.at(x).project(x)

    def to_json(self) -> dict[str, Any]:
        """Returns the format as JSON values; `from_json` is its inverse."""
        bounds = [end if math.isfinite(end) else None for end in self.bounds]
        limits = [int(self.qmin), int(self.qmax)]
        static = {"spec": self.spec.to_json(), "axis": self.axis, "bounds": bounds}
        return {"format": self.name, "limits": limits} | static

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Dynamic":
        """Rebuilds a format from `to_json`'s output."""
        given = zip(fields["bounds"], EVERYTHING, strict=True)
        low, high = (end if bound is None else bound for bound, end in given)
        qmin, qmax = map(np.int32, fields["limits"])
        return cls(qmin, qmax, QuantSpec(**fields["spec"]), fields["axis"], (low, high))


ActivationFormat = QParams | Dynamic


def dynamic(
    spec: QuantSpec, limits: Any, axis: int | None = None, bounds: Bounds = EVERYTHING
) -> Dynamic:
    """The format that finds the ranges of a spec at run time.

    Args:
      spec: the number format; its granularity is per_tensor or per_example.
      limits: of its width, see `QuantSpec.limits`.
      axis: of the examples, read where the granularity is per_example.
      bounds: what a range is cut to.

    Returns:
      A `Dynamic`.
    """
    axis = axis if spec.granularity == "per_example" else None
    qmin, qmax = limits
    return Dynamic(qmin, qmax, spec.stored, axis, bounds)
