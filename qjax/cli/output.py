"""Standard output whose reader may leave, and that lacks characters where it must."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TextIO

from qjax.report import WIDTH
from qjax.table import printable


class _Patient(io.TextIOBase):
    """A stream that takes what nobody reads: after `| head -1` the rest of the work is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._patience():
            self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        with self._patience():
            self._stream.flush()

    def close(self) -> None:
        """Closes nothing: the stream is another's."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.encoding

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still in the buffer goes nowhere, without an error when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def columns() -> int:
    """The width for tables: that of a terminal narrower than they are, else their own."""
    return min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Makes standard output one while the context is open.

    A character that its encoding lacks becomes a question mark; control characters are spelled out.
    """
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    sys.stdout = _Patient(stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = stream
