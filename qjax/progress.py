"""A progress bar on standard error."""

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]


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
