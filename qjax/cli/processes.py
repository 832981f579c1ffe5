"""`--coordinator`: one of several processes that quantize together, each on devices of its own."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qjax import hosts
from qjax.cli.wording import flag

DETECTED = "auto"
OF_ONE_PROCESS = (
    *("search_bits", "average_bits", "max_bytes", "target_drop", "tune", "end_search"),
    "data_free",
)


def add_arguments(add: Callable[..., Any]) -> None:
    """Declares the options, by a parser's or a group's `add_argument`."""
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="quantize in several processes, each with these options: where the first one "
        f"listens; {DETECTED}: as Slurm, Open MPI or a TPU pod says",
    )
    add("--processes", type=int, metavar="N", help="how many processes there are")
    add("--process", type=int, metavar="I", help="which one this is: 0 to N-1; 0 prints and writes")


def check(arguments: argparse.Namespace) -> None:
    """Refuses options that do not go together.

    Raises:
      ValueError: an option is missing, or not possible.
    """
    coordinator, count, own = (
        getattr(arguments, name) for name in ("coordinator", "processes", "process")
    )
    if coordinator is None:
        for option, value in (("--processes", count), ("--process", own)):
            if value is not None:
                raise ValueError(f"`{option}` needs `--coordinator`; add it, or leave both out.")
        return
    for option in OF_ONE_PROCESS:
        if getattr(arguments, option):
            raise ValueError(
                f"`{flag(option)}` runs in one process; leave it out, or `--coordinator`."
            )
    if coordinator == DETECTED:
        if count is not None or own is not None:
            raise ValueError(
                f"`--coordinator {DETECTED}` finds out how many processes there are; leave out "
                "`--processes` and `--process`."
            )
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"`--coordinator` must be HOST:PORT or {DETECTED}; got {coordinator!r}.")
    if count is None or own is None:
        raise ValueError("`--coordinator` needs `--processes` and `--process`; add them.")
    if count < 1 or not 0 <= own < count:
        raise ValueError(
            "`--process` must be from 0 to below `--processes`; got "
            f"{own} with `--processes {count}`."
        )


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[jax.sharding.Mesh | None]:
    """Meets the other processes; the first one alone prints.

    Args:
      arguments: of the command.

    Yields:
      All devices of all processes; None without `--coordinator`.

    Raises:
      ValueError: the others do not come.
    """
    if arguments.coordinator is None:
        yield None
        return
    given = (arguments.coordinator, arguments.processes, arguments.process)
    try:
        jax.distributed.initialize(*(() if arguments.coordinator == DETECTED else given))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`--coordinator`: the processes did not meet: {error}") from error
    with contextlib.ExitStack() as stack:
        if not hosts.is_first():
            arguments.quiet = True
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield jax.make_mesh((jax.device_count(),), ("devices",))
    jax.distributed.shutdown()  # not after an error: the others would be waited for


def share(images: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """This process's share of calibration images.

    Raises:
      ValueError: there are fewer images than processes.
    """
    if mesh is None:
        return images
    count = jax.process_count()
    if len(images) < count:
        raise ValueError(
            f"`--calibration-size` must be at least the number of processes, {count}; got "
            f"{len(images)}."
        )
    return np.array_split(np.asarray(images), count)[jax.process_index()]
