"""Progress on standard error: a bar on a terminal, now and then a line in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]

PERIOD = 10.0  # seconds from one line to the next


@contextlib.contextmanager
def progress_bar(stage: str) -> Iterator[Progress]:
    """Shows a bar while the context is open.

    Args:
      stage: what is under way.

    Yields:
      A function of (what is being done, how much is done, how much there is).

    Raises:
      ImportError: rich is not installed.
    """
    try:
        from rich import console, progress
    except ImportError as error:
        raise ImportError(
            "a progress bar needs the package rich; install it (`pip install rich`), or pass a "
            "function as `progress`."
        ) from error
    columns = (
        progress.TextColumn("{task.description:<20}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[item]}"),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(stage, item="", total=None)

        def update(item: str, done: int, total: int) -> None:
            bar.update(task, item=item, completed=done, total=total)

        yield update


@contextlib.contextmanager
def progress_lines(stage: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Writes a line every ten seconds while the context is open; short work writes none.

    Args:
      stage: what is under way.
      clock: tells the seconds.

    Yields:
      A function of (what is being done, how much is done, how much there is).

    Examples:
      >>> with contextlib.redirect_stderr(sys.stdout), progress_lines(
      ...     "quantizing", clock=iter([0.0, 5.0, 12.0, 66.0]).__next__
      ... ) as progress:
      ...     progress("conv1", 1, 22)
      ...     progress("conv2", 4, 22)
      ...     progress("", 22, 22)
      quantizing   18 %, 4 of 22, 54 s left: conv2
      quantizing   100 %, 22 of 22, 0 s left
    """
    start = last = clock()

    def update(item: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if now - last < PERIOD:
            return
        last = now
        left = f", {(now - start) * (total - done) / done:.0f} s left" if done else ""
        share = f"{100 * done / total:.0f} %, {done} of {total}{left}"
        sys.stderr.write(f"{stage:<12} {share}{f': {item}' if item else ''}\n")
        sys.stderr.flush()

    yield update
