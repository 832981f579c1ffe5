"""Ctrl-C and SIGTERM end a command at once, with its temporary files removed."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """A signal that ends the command.

    Attributes:
      signal: its number.
    """

    def __init__(self, number: int) -> None:
        """Takes the number of the signal."""
        self.signal: signal.Signals = signal.Signals(number)
        super().__init__(SIGNALS[self.signal])

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal ends: 130, 143."""
        return 128 + self.signal


_received: list[int] = []


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raises `Stopped` where a signal arrives while the context is open.

    Python drops exceptions in some places (a finalizer, a callback of a native library). What is
    lost there is raised again by `check`, at the next step of progress, and at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    _received.clear()
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises `Stopped` if a signal arrived since the context was opened."""
    if _received:
        raise Stopped(_received[0])


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    _received.append(number)
    check()
