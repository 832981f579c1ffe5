"""Calibration images: an array, a list, or something that is read as often as needed."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph.naming import path_names
from qjax.hosts import gathered, gathered_text


class Images(Protocol):
    """Calibration images.

    Attributes:
      total: how many there are.
      shapes: of one of them, a pytree of `jax.ShapeDtypeStruct`.
      digest: the SHA-256 of all.
      is_in_memory: whether reading them costs nothing.
    """

    total: int
    shapes: Any
    is_in_memory: bool

    @property
    def digest(self) -> str:
        """The SHA-256 of all."""
        ...

    def batches(self, sizes: Sequence[int]) -> Iterator[Any]:
        """Batches of these sizes in the order of the images, the rest left out."""
        ...


def images_of(batches: Any, argument: str = "batches") -> Images:
    """Reads calibration images once, and checks them.

    Args:
      batches: what `qjax.quantize` takes.
      argument: what its caller calls them.

    Raises:
      TypeError: they are no arrays.
      ValueError: they do not fit together, are not finite, or there is none.
    """
    is_one = isinstance(batches, Mapping) or hasattr(batches, "shape")
    if not is_one and callable(batches):
        return _Read(cast(Callable[[], Iterable[Any]], batches), argument)
    if is_one or isinstance(batches, Sequence | Iterator):
        return _Held(gather(batches, argument), argument)
    return _Read(lambda: iter(batches), argument)


class _Held:
    """Images in memory."""

    is_in_memory = True

    def __init__(self, images: Any, argument: str) -> None:
        check_finite(argument, images)
        self._images = images
        self.total = len(jax.tree.leaves(images)[0])
        self.shapes = _shapes(images)

    @property
    def digest(self) -> str:
        found = _Digest()
        found.update(self._images)
        return found.hexdigest()

    def batches(self, sizes: Sequence[int]) -> Iterator[Any]:
        yield from _taken(iter([self._images]), sizes, self.shapes)


class _Read:
    """Images that are read again whenever they are needed."""

    is_in_memory = False

    def __init__(self, read: Callable[[], Iterable[Any]], argument: str) -> None:
        self._read, self._argument = read, argument
        first, self.total, self.digest = None, 0, ""
        found = _Digest()
        for part in self._parts():
            check_finite(argument, part)
            found.update(part)
            first = part if first is None else first
            self.total += len(jax.tree.leaves(part)[0])
        if first is None:
            raise ValueError(f"`{argument}` is empty; pass at least one image.")
        if not self.total:
            raise ValueError(f"`{argument}` holds no image; pass at least one.")
        self.shapes, self.digest = _shapes(first), found.hexdigest()

    def _parts(self) -> Iterator[Any]:
        """The batches as they are handed over."""
        kind = ""
        for part in self._read():
            check_parts([part], self._argument)
            part = jax.tree.map(np.asarray, part)
            own = _kind(part)
            if kind not in ("", own):
                raise _several_kinds({kind, own}, self._argument)
            kind = own
            _check_equal_sizes(part, self._argument)
            yield part

    def batches(self, sizes: Sequence[int]) -> Iterator[Any]:
        found, total = _Digest(), 0

        def parts() -> Iterator[Any]:
            nonlocal total
            for part in self._parts():
                found.update(part)
                total += len(jax.tree.leaves(part)[0])
                yield part

        read = parts()
        yield from _taken(read, sizes, self.shapes)
        collections.deque(read, maxlen=0)
        if found.hexdigest() != self.digest:
            raise ValueError(
                f"`{self._argument}` gave {self.total} images when it was read first, and "
                f"{'other' if total == self.total else total} ones when it was read again; it must "
                "give the same images in the same order every time. Turn off shuffling, or pass "
                "list(batches)."
            )


def _taken(parts: Iterator[Any], sizes: Sequence[int], shapes: Any) -> Iterator[Any]:
    """Cuts parts of images into batches of other sizes, as far as they last."""
    rest = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), shapes)
    for size in sizes:
        kept, count = [rest], len(jax.tree.leaves(rest)[0])
        while count < size:
            part = next(parts, None)
            if part is None:
                return
            kept.append(part)
            count += len(jax.tree.leaves(part)[0])
        kept = [part for part in kept if len(jax.tree.leaves(part)[0])] or [rest]
        joined = jax.tree.map(lambda *x: x[0] if len(x) == 1 else np.concatenate(x), *kept)
        yield jax.tree.map(lambda leaf, size=size: leaf[:size], joined)
        rest = jax.tree.map(lambda leaf, size=size: leaf[size:], joined)


class Shares:
    """The images of all processes, in the order of the processes.

    A batch holds this process's own images at their places, and zeros elsewhere.
    """

    def __init__(self, own: Images, argument: str = "batches") -> None:
        """Counts the images of all processes.

        Args:
          own: those of this process.
          argument: what its caller calls them.

        Raises:
          ValueError: they are not of one kind.
        """
        kinds = gathered_text(hashlib.sha256(str(own.shapes).encode()).hexdigest())
        if len(set(kinds)) > 1:
            raise ValueError(
                f"`{argument}` must have images of the same shape and type in every process; this "
                f"one has {own.shapes}."
            )
        counts = gathered(own.total).ravel()
        self._own, self._count = own, own.total
        self._start = int(counts[: jax.process_index()].sum())
        self.total: int = int(counts.sum())
        self.shapes: Any = own.shapes
        self.is_in_memory: bool = own.is_in_memory
        self.digest: str = hashlib.sha256("".join(gathered_text(own.digest)).encode()).hexdigest()

    def batches(self, sizes: Sequence[int]) -> Iterator[Any]:
        """Batches of all images, the own ones in place; see `Images`."""
        ends = np.cumsum(sizes)
        starts = ends - np.asarray(sizes)
        first, last = (
            np.clip(edges, self._start, self._start + self._count) for edges in (starts, ends)
        )
        own = self._own.batches((last - first).tolist())
        for size, at, part in zip(sizes, (first - starts).tolist(), own, strict=False):

            def padded(leaf: np.ndarray, size: int = size, at: int = at) -> np.ndarray:
                found = np.zeros((size, *leaf.shape[1:]), leaf.dtype)
                found[at : at + len(leaf)] = leaf
                return found

            yield jax.tree.map(padded, part)
        collections.deque(own, maxlen=0)


class _Digest:
    """The SHA-256 of images, however they are cut into batches."""

    def __init__(self) -> None:
        self._leaves: dict[str, Any] = {}
        self._total = 0

    def update(self, images: Any) -> None:
        leaves = jax.tree.leaves(images)
        for name, leaf in zip(path_names(images), leaves, strict=True):
            key = f"{name} {leaf.dtype}{leaf.shape[1:]}"
            hashed = self._leaves.setdefault(key, hashlib.sha256())
            hashed.update(np.ascontiguousarray(leaf).tobytes())
        self._total += len(leaves[0])

    def hexdigest(self) -> str:
        parts = [f"{key} {hashed.hexdigest()}" for key, hashed in self._leaves.items()]
        return hashlib.sha256("\n".join([str(self._total), *parts]).encode()).hexdigest()


class Cut(NamedTuple):
    """How images are cut into batches of equal size.

    Attributes:
      count: batches.
      size: images of each.
    """

    count: int
    size: int

    @property
    def sizes(self) -> list[int]:
        """The size of each batch."""
        return [self.size] * self.count


class Batches:
    """Images on the device, a batch at a time; the one that was read last is kept."""

    def __init__(self, images: Images, cut: Cut, place: Callable[[Any], Any]) -> None:
        """Reads nothing yet.

        Args:
          images: what to read.
          cut: how.
          place: brings a batch to the devices.
        """
        self._images, self._cut, self._place = images, cut, place
        self._next, self._unread = 0, iter(())
        self._last: tuple[int, list[jax.Array]] = (-1, [])

    def __len__(self) -> int:
        return self._cut.count

    def leaves(self) -> list["_Leaf"]:
        """The leaves of an input, each to be read batch by batch."""
        return [_Leaf(self, position) for position, _ in enumerate(jax.tree.leaves(self.shapes))]

    @property
    def shapes(self) -> Any:
        """Of one image."""
        return self._images.shapes

    def read(self, number: int) -> list[jax.Array]:
        """The leaves of an input on one batch."""
        if self._last[0] != number:
            if number < self._next or not number:
                self._next, self._unread = 0, self._images.batches(self._cut.sizes)
            for _ in range(self._next, number):
                next(self._unread)
            self._last = number, jax.tree.leaves(self._place(next(self._unread)))
            self._next = number + 1
            if self._next == self._cut.count:  # the end tells whether the images are the same
                collections.deque(self._unread, maxlen=0)
        return self._last[1]


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    batches: Batches
    position: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> jax.Array:
        return self.batches.read(number)[self.position]


def _shapes(images: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), images)


def gather(batches: Any, argument: str = "batches") -> Any:
    """Joins batches to one pytree of arrays with a leading axis of all images.

    Args:
      batches: of images, as `qjax.quantize` takes them.
      argument: what its caller calls them.

    Raises:
      TypeError: they are no arrays.
      ValueError: they do not fit together, or there is none.
    """
    is_one = isinstance(batches, Mapping) or hasattr(batches, "shape")
    given: Any = batches() if callable(batches) and not is_one else batches
    parts = [given] if is_one else list(given)
    if not parts:
        raise ValueError(f"`{argument}` is empty; pass at least one image.")
    check_parts(parts, argument)
    images = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(x) for x in leaves]), *parts)
    _check_equal_sizes(images, argument)
    if not len(jax.tree.leaves(images)[0]):
        raise ValueError(f"`{argument}` holds no image; pass at least one.")
    return images


def _check_equal_sizes(images: Any, argument: str) -> None:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(images)}
    if len(sizes) != 1:
        raise ValueError(
            f"every array in `{argument}` must have the same leading axis of examples; got "
            f"{sorted(sizes)} of them."
        )


def check_parts(parts: Sequence[Any], argument: str) -> None:
    """Refuses batches that are no arrays of examples, or whose examples have several shapes."""
    for part in parts:
        for leaf in part.values() if isinstance(part, Mapping) else [part]:
            if not getattr(leaf, "shape", None):
                found = f"a {type(part).__name__} of {len(part)}" if isinstance(part, tuple) else ""
                raise TypeError(
                    "every batch must be an array of images, or a mapping of arrays; got "
                    f"{found or type(leaf).__name__}. Of (image, label) pairs pass the images "
                    "alone: (x for x, _ in batches)."
                )
    kinds = {_kind(part) for part in parts}
    if len(kinds) > 1:
        raise _several_kinds(kinds, argument)


def _kind(part: Any) -> str:
    return str(jax.tree.map(lambda leaf: leaf.shape[1:], part))


def _several_kinds(kinds: set[str], argument: str) -> ValueError:
    return ValueError(
        "every batch must have images of the same shape; got "
        f"{' and '.join(sorted(kinds))}. If `{argument}` is (images, labels), pass images "
        "alone."
    )


def check_finite(argument: str, tree: Any) -> None:
    """Refuses arrays with NaN or infinity."""
    for path, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_float and not np.all(np.isfinite(np.asarray(leaf, np.float32))):
            where = f" at {path!r}" if path else ""
            raise ValueError(
                f"`{argument}` must be finite; found NaN or infinity{where}. Check how it was made."
            )
