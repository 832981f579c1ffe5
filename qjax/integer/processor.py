"""What the processor of this machine is, and what it can do."""

import functools
import platform
from pathlib import Path

_INSTRUCTIONS = {"avx512_vnni", "amx_int8"}  # as Linux calls those that XLA's products of bytes use


@functools.cache
def has_dot_instructions() -> bool:
    """Whether the CPU has int8 dot instructions that XLA uses; False where that cannot be read."""
    return not _INSTRUCTIONS.isdisjoint(_field("flags").split())


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
