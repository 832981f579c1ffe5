"""What is running: versions of packages, and on what."""

import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from qjax.threads import cores


def _own_version() -> str:
    try:
        return importlib.metadata.version("qjax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


VERSION: str = _own_version()


def versions() -> dict[str, str]:
    """The versions of qjax, jax, numpy and Python that are running."""
    return {
        "qjax": VERSION,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def environment() -> dict[str, Any]:
    """What sums in float32 depend on in addition to versions: cores, kind of device, machine."""
    kind = jax.devices()[0].device_kind
    return {"cores": cores(), "device": kind, "machine": platform.machine()}
