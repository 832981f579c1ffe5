"""The description of a number format: static and hashable, with no arrays in it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from qjax.fields import check_fields
from qjax.formats.affine import AFFINE, limits_of, storage_type
from qjax.formats.apot import ADDITIVE_POWERS
from qjax.formats.base import NumberFormat
from qjax.formats.binary import BINARY
from qjax.formats.kmeans import KMEANS
from qjax.formats.nf4 import NORMAL_FLOAT
from qjax.formats.power_of_two import POWERS
from qjax.formats.quantile import QUANTILE
from qjax.formats.scales import FREE, SCALES, Scales

T = TypeVar("T")

KernelGranularity = Literal["per_tensor", "per_channel", "per_group"]
ActivationGranularity = Literal["per_tensor", "per_channel", "per_example"]
Granularity = Literal["per_tensor", "per_channel", "per_group", "per_example"]
ActivationRanges = Literal["static", "dynamic"]

_FOUND_AT_RUN_TIME = ("per_tensor", "per_example")

MIN_BITS, MAX_BITS = 1, 16

FORMATS: dict[str, NumberFormat] = {
    format.name: format
    for format in (AFFINE, BINARY, KMEANS, POWERS, ADDITIVE_POWERS, NORMAL_FLOAT, QUANTILE)
}


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Refuses what is not among some choices.

    Raises:
      ValueError: the message names the argument and lists the choices.
    """
    if value not in tuple(choices):
        raise ValueError(f"`{argument}` must be one of {', '.join(choices)}; got {value!r}.")


def in_table(argument: str, given: str | T, table: Mapping[str, T]) -> T:
    """A method by its name in a table, or one that is given itself.

    Raises:
      ValueError: it is neither; the message names the argument and lists the table.
    """
    if isinstance(given, type(next(iter(table.values())))):
        return given
    check_choice(argument, given, table)
    return table[str(given)]


def check_bits(argument: str, bits: Any) -> None:
    """Refuses a width that no code has.

    Raises:
      ValueError: it is no integer from 1 to 16.
    """
    is_integer = isinstance(bits, int | np.integer) and not isinstance(bits, bool)
    if not (is_integer and MIN_BITS <= int(bits) <= MAX_BITS):
        raise ValueError(
            f"`{argument}` must be an integer from {MIN_BITS} to {MAX_BITS}; got {bits!r}."
        )


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The number format of one kind of tensor.

    Attributes:
      bits: width of a code, 1 to 16.
      symmetric: signed codes −(2^(b−1)−1) … 2^(b−1)−1 around zero_point 0, of at least 2 bits;
        otherwise unsigned codes 0 … 2^b−1 with a zero point.
      granularity: one scale per tensor, per channel (of a kernel: per output channel), or per group
        of `group_size` input elements of each output channel of a kernel; of activations whose
        ranges are dynamic also one per example.
      group_size: input elements that share a scale; read only when `granularity` is per_group.
      format: what codes stand for: a name in `qjax.formats.spec.FORMATS`, or a `NumberFormat`.
      scale: which scales there are: `free`, or `power_of_two` for fixed point, where unsigned codes
        have no zero point either: a tensor that has values below 0 is signed.
      ranges: of activations: `static`, chosen on calibration images, or `dynamic`, the extremes of
        what a tensor holds at run time.

    Raises:
      ValueError: a field is outside its range.

    Examples:
      >>> spec = QuantSpec(bits=4)
      >>> int(spec.qmin), int(spec.qmax)
      (-7, 7)
      >>> int(QuantSpec(bits=4, symmetric=False).qmax)
      15
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "per_channel"
    group_size: int = 32
    format: str | NumberFormat = AFFINE.name
    scale: str | Scales = FREE.name
    ranges: ActivationRanges = "static"

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        object.__setattr__(self, "bits", int(self.bits))
        check_fields(self, ("symmetric", "group_size"))
        check_choice("granularity", self.granularity, get_args(Granularity))
        if self.group_size < 1:
            raise ValueError(f"`group_size` must be at least 1; got {self.group_size}.")
        widths = in_table("format", self.format, FORMATS).widths
        if self.bits not in widths:
            allowed = f"from {widths[0]} to {widths[-1]}" if len(widths) > 1 else f"{widths[0]}"
            raise ValueError(
                f"`bits` must be {allowed} in the format {self.family.name}; got {self.bits}. Use "
                f"another width, or format={AFFINE.name!r}."
            )
        if self.bits == 1 and self.symmetric and self.family is AFFINE:
            raise ValueError(
                "`bits` must be at least 2 for symmetric codes; got 1. For one bit, use "
                f"QuantSpec.at(1) or format={BINARY.name!r}."
            )
        in_table("scale", self.scale, SCALES)
        if self.scales.cover is not None and self.family is not AFFINE:
            raise ValueError(
                f"`scale` {self.scales.name} is for the format {AFFINE.name}; got "
                f"{self.family.name}, whose scale must be {FREE.name}."
            )
        check_choice("ranges", self.ranges, get_args(ActivationRanges))
        if self.granularity == "per_example" and not self.is_dynamic:
            raise ValueError(
                "`granularity` per_example needs `ranges` dynamic; got static, which are known "
                "before any example: use per_tensor."
            )
        if self.is_dynamic and self.granularity not in _FOUND_AT_RUN_TIME:
            raise ValueError(
                f"`granularity` must be {' or '.join(_FOUND_AT_RUN_TIME)} where `ranges` are "
                f"dynamic; got {self.granularity}."
            )

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are found at run time."""
        return self.ranges == "dynamic"

    @property
    def per_tensor(self) -> "QuantSpec":
        """The same spec with one scale to a tensor."""
        return dataclasses.replace(self, granularity="per_tensor")

    def at(self, bits: int, format: str | NumberFormat | None = None) -> "QuantSpec":
        """The same spec at another width; symmetric uniform codes of one bit are binary.

        Args:
          bits: the width.
          format: another format as well.

        Examples:
          >>> QuantSpec(8).at(1).format, QuantSpec(8).at(1).at(4).format
          ('binary', 'uniform')
          >>> QuantSpec(8).at(3, "kmeans").format
          'kmeans'
        """
        own = AFFINE if self.family is BINARY else self.format
        own = own if format is None else format
        is_affine = in_table("format", own, FORMATS) is AFFINE
        format = BINARY.name if bits == 1 and self.symmetric and is_affine else own
        name = format if isinstance(format, str) else format.name
        return dataclasses.replace(self, bits=bits, format=name if name in FORMATS else format)

    @property
    def qmin(self) -> int:
        """The smallest code, inclusive."""
        return int(limits_of(self)[0])

    @property
    def qmax(self) -> int:
        """The largest code, inclusive."""
        return int(limits_of(self)[1])

    @property
    def dtype(self) -> np.dtype:
        """The type that codes are stored in."""
        return storage_type(self.bits, self.symmetric)

    @property
    def family(self) -> NumberFormat:
        """The family of formats."""
        return in_table("format", self.format, FORMATS)

    @property
    def scales(self) -> Scales:
        """Which scales there are."""
        return in_table("scale", self.scale, SCALES)

    @property
    def limits(self) -> Any:
        """What depends on the width alone, a pytree of arrays."""
        return self.family.limits(self)

    @property
    def stored(self) -> "QuantSpec":
        """The spec up to its width, of which only the storage type is kept.

        Together with `limits` it says all that there is to say; it alone decides what is compiled.
        """
        return dataclasses.replace(
            self, bits=min(8 if self.bits <= 8 else 16, self.family.widths[-1])
        )

    def cover(self, low: Any, high: Any, limits: Any = None) -> Any:
        """The format that covers [low, high].

        Args:
          low: float[...], the smallest value to represent.
          high: float[...], the largest.
          limits: those of the width in question; by default of this spec's.

        Returns:
          A `Format` of that shape.
        """
        cover = self.scales.cover or self.family.cover
        return cover(low, high, self, self.limits if limits is None else limits)

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"format": self.family.name, "scale": self.scales.name}
        usual = {"format": AFFINE.name, "scale": FREE.name, "ranges": "static"}
        return {k: v for k, v in fields.items() if (k, v) not in usual.items()}
