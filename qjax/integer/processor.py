"""What the processor of this machine is, and what it can do."""

import functools
import platform
from pathlib import Path

# The extensions with int8 dot instructions that XLA's products use, the fastest first, and what
# Linux calls them.
_EXTENSIONS = {"AMX": "amx_int8", "VNNI": "avx512_vnni"}


@functools.cache
def dot_extension() -> str | None:
    """The fastest extension of the CPU for products of bytes; None where that cannot be read."""
    flags = _field("flags").split()
    return next((name for name, flag in _EXTENSIONS.items() if flag in flags), None)


def name_of_processor() -> str:
    """The model of the CPU, or its architecture where that cannot be read."""
    return _field("model name") or platform.machine()


def _field(name: str) -> str:
    """A field of the first processor in Linux's list, empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")
