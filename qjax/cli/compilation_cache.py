"""JAX's persistent compilation cache, so that a second run compiles next to nothing.

JAX names an entry after everything that its program depends on (operations, shapes, versions, the
device), so entries never have to be invalidated, and the folder may be deleted at any time.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pretrained.datasets import cache_dir

FOLDER = "xla"  # in the cache folder of qjax
DIRECTORY = "jax_compilation_cache_dir"


def add_argument(add: Callable[..., Any]) -> None:
    """Declares how `caching` is turned off, by a parser's `add_argument`."""
    text = "compile everything again, and keep nothing of it for the next run"
    add("--no-compilation-cache", action="store_true", help=text)


def caching(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Keeps what is compiled while the context is open, as the user wants it.

    In order: nothing with `--no-compilation-cache`; in the folder that QJAX_CACHE_DIR names; as
    JAX's own options say, if they name a folder; in the user's cache folder. Where that cannot be
    written, nothing is kept, and a note on standard error says so unless `--quiet`.
    """
    if arguments.no_compilation_cache:
        return _caching(**{DIRECTORY: None})
    if getattr(jax.config, DIRECTORY) and not os.environ.get("QJAX_CACHE_DIR"):
        return _caching()
    try:
        folder = cache_dir() / FOLDER
        _check_writable(folder)
    except (OSError, RuntimeError) as error:  # a RuntimeError: there is no home directory
        if not arguments.quiet:
            print(f"qjax: note: no compilation cache: {error}", file=sys.stderr)
        return _caching(**{DIRECTORY: None})
    return _caching(
        **{DIRECTORY: str(folder)},
        jax_persistent_cache_min_compile_time_secs=0.0,  # many small programs add up
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def _check_writable(folder: Path) -> None:
    """Makes a folder, for the user alone since JAX runs what it finds there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _caching(**options: Any) -> Iterator[None]:
    """Sets options of JAX while the context is open: `main` is also called within a process.

    JAX warns of every entry that it cannot read or write, e.g. on a full disk, and compiles.
    """
    before = {name: getattr(jax.config, name) for name in options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
        try:
            _set(options)
            yield
        finally:
            _set(before)


def _set(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    if options:
        compilation_cache.reset_cache()  # JAX opens its folder once
