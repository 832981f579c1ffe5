"""Compiling on several cores: programs from both ends, and functions side by side.

What fits a network takes programs that follow from shapes alone, and most of its time is spent on
compiling them. So a second thread goes through the same steps on shapes (`jax.ShapeDtypeStruct`),
which tells every program that will be called, and compiles them from the last one on, while the
first thread compiles and calls them from the first one on.
"""

import contextlib
import contextvars
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from qjax.programs import calling


def is_shape(value: Any) -> bool:
    """Whether a value is known by its shape alone: nothing can be read from it."""
    return isinstance(value, jax.ShapeDtypeStruct)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def compiled_from_both_ends(rehearse: Callable[[], object]) -> Iterator[None]:
    """Compiles in another thread what is called within, the last program first.

    Args:
      rehearse: calls, on shapes, the programs that will be called within, in their order.
    """
    claims = _Claims()
    rehearsal = _Rehearsal(claims, _settings())
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(rehearsal.run, rehearse), name="compiling")
    thread.start()
    try:
        with calling(claims.call):
            yield
    finally:
        rehearsal.is_stopped = True
    if rehearsal.failure is not None:
        warnings.warn(
            "The programs that fit the network could not be compiled ahead, which takes more time "
            f"but changes no result: {rehearsal.failure!r}. Please report it.",
            RuntimeWarning,
            stacklevel=3,
        )


def side_by_side(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls functions, as many at a time as there are cores; no program is compiled twice."""
    if cores() < 2:
        return [function() for function in functions]
    claims = _Claims()

    def call(function: Callable[[], Any]) -> Any:
        with calling(claims.call):
            return function()

    with ThreadPoolExecutor(cores()) as pool:
        contexts = [contextvars.copy_context() for _ in functions]
        return list(pool.map(lambda context, each: context.run(call, each), contexts, functions))


_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_device",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
    "jax_debug_nans",
)


def _settings() -> list[Any]:
    """What a context of JAX can change of the programs in this thread."""
    return [getattr(jax.config, name) for name in _SETTINGS]


class _Claims:
    """Which programs are compiled already, or are being compiled, by any of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claimed: dict[Hashable, threading.Event] = {}

    @contextlib.contextmanager
    def claim(self, key: Hashable, waits: bool) -> Iterator[bool]:
        """Tells whether nobody has claimed a program yet; within, it is to be compiled.

        Args:
          key: the program.
          waits: whether to wait until it is compiled, if somebody else has claimed it.
        """
        own = threading.Event()
        with self._lock:
            claimed = self._claimed.setdefault(key, own)
        try:
            if waits and claimed is not own:
                claimed.wait()
            yield claimed is own
        finally:
            own.set()

    def call(self, jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a program."""
        with self.claim(_key(jitted, args, kwargs), waits=True), calling():
            return jitted(*args, **kwargs)


class _Rehearsal:
    """What the second thread does.

    Attributes:
      failure: what ended it.
      is_stopped: whether it is to end once the program that it compiles is compiled.
    """

    failure: Exception | None = None
    is_stopped = False

    def __init__(self, claims: _Claims, settings: list[Any]) -> None:
        self._claims, self._settings = claims, settings
        self._traced: dict[Hashable, Any] = {}

    def run(self, rehearse: Callable[[], object]) -> None:
        """Traces all programs, then compiles them from the last one on."""
        if _settings() != self._settings:  # contexts of JAX are those of one thread
            return
        try:
            with calling(self._trace):
                rehearse()
            for key, traced in reversed(self._traced.items()):
                if self.is_stopped:
                    break
                with self._claims.claim(key, waits=False) as is_first:
                    if is_first:
                        traced.lower().compile()
        except (_StoppedError, Warning):  # warnings may be errors; the first thread warns too
            pass
        except Exception as error:  # what is wrong with the network the first thread will find
            self.failure = error

    def _trace(self, jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.is_stopped:
            raise _StoppedError
        with calling():  # what is called on constants while tracing has values
            traced = jitted.trace(*args, **kwargs)
        self._traced.setdefault(_key(jitted, args, kwargs), traced)
        return traced.out_info


class _StoppedError(Exception):
    """The first thread needs no further help."""


def _key(jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What tells a program from others: the function, the shapes of arrays, all else as it is."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    return jitted, tree, tuple(map(_signature, leaves))


def _signature(leaf: Any) -> Hashable:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf.shape, leaf.dtype
    return leaf
