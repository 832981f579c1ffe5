"""What the processor of this machine can do."""

import functools
from pathlib import Path

_INSTRUCTIONS = {"avx512_vnni", "amx_int8"}  # as Linux calls those that XLA's products of bytes use


@functools.cache
def has_dot_instructions() -> bool:
    """Whether the CPU has int8 dot instructions that XLA uses; False where that cannot be read."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not _INSTRUCTIONS.isdisjoint(flags)
