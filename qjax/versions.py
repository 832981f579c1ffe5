"""What is running: versions of packages."""

import importlib.metadata
import platform

import jax
import numpy as np


def versions() -> dict[str, str]:
    """The versions of qjax, jax, numpy and Python that are running."""
    try:
        own = importlib.metadata.version("qjax")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "qjax": own,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
