"""Compiling what will be called while something else is called: two threads, from both ends.

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
from typing import Any

import jax

from qjax.programs import CALLING


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
    helper = _Helper()
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(helper.work, rehearse), name="compiling")
    thread.start()
    token = CALLING.set(helper.call)
    try:
        yield
    finally:
        CALLING.reset(token)
        helper.stop()
    if helper.failure is not None:
        warnings.warn(
            "The programs that fit the network could not be compiled ahead, which takes more time "
            f"but changes no result: {helper.failure!r}. Please report it.",
            RuntimeWarning,
            stacklevel=3,
        )


class _Helper:
    """What two threads know of each other.

    Attributes:
      failure: what ended the second thread.
    """

    failure: Exception | None = None

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[Hashable, threading.Event] = {}
        self._is_stopped = False

    def work(self, rehearse: Callable[[], object]) -> None:
        """What the second thread does."""
        traced: dict[Hashable, Any] = {}

        def trace(jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            if self._is_stopped:
                raise _StoppedError
            found = jitted.trace(*args, **kwargs)
            traced.setdefault(_key(jitted, args, kwargs), found)
            return found.out_info

        CALLING.set(trace)
        try:
            rehearse()
            for key, each in reversed(traced.items()):
                if self._is_stopped:
                    break
                event = threading.Event()
                if self._begin(key, event) is event:
                    try:
                        each.lower().compile()
                    finally:
                        event.set()
        except _StoppedError:
            pass
        except Exception as error:  # what is wrong with the network the other thread will find
            self.failure = error

    def call(self, jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a program in the first thread; waits for it if it is being compiled."""
        self._begin(_key(jitted, args, kwargs), _DONE).wait()
        return jitted(*args, **kwargs)

    def stop(self) -> None:
        """Ends the second thread once the program that it compiles is compiled."""
        self._is_stopped = True

    def _begin(self, key: Hashable, event: threading.Event) -> threading.Event:
        with self._lock:
            return self._begun.setdefault(key, event)


class _StoppedError(Exception):
    """The first thread needs no further help."""


_DONE = threading.Event()
_DONE.set()


def _key(jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What tells a program from others: the function, the shapes of arrays, all else as it is."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    return jitted, tree, tuple(map(_signature, leaves))


def _signature(leaf: Any) -> Hashable:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return leaf.shape, leaf.dtype
    return leaf
