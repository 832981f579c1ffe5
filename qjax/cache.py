"""Where what can be found again is kept between runs."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Returns the user's cache folder for everything that qjax keeps.

    That is QJAX_CACHE_DIR, by default `qjax` in the platform's: %LOCALAPPDATA% on Windows,
    ~/Library/Caches on macOS, elsewhere $XDG_CACHE_HOME or ~/.cache.

    Raises:
      RuntimeError: there is no home directory.
    """
    if own := os.environ.get("QJAX_CACHE_DIR"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local or Path.home() / "AppData" / "Local") / "qjax"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qjax"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qjax"
