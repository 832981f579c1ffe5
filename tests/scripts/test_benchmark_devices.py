"""What `scripts/benchmark.py scaling` counts in compiled programs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import benchmark_devices


def work(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A convolution, a product over all images, and seven products of the 8 by 8 result."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions)
    h = jnp.einsum("bijk,bijl->kl", y, y)
    return jax.lax.fori_loop(0, 7, lambda _, h: h @ h / jnp.max(h), h), y


def test_products_and_collectives_are_counted(mesh: Mesh):
    own = Mesh(mesh.devices, "images")
    w = np.ones((3, 3, 4, 8), np.float32)
    for devices in (1, 4):
        x = jnp.ones((8, 16, 16, 4))
        if devices > 1:
            x = jax.device_put(x, NamedSharding(own, PartitionSpec("images")))
        text = jax.jit(work).lower(x, w).compile().as_text()
        found = benchmark_devices.count(text or "")
        shared = 2 * (8 * 16 * 16 * 8 * 3 * 3 * 4 + 8 * 16 * 16 * 8 * 8)
        assert found.products == shared / devices + 7 * 2 * 8**3
        assert found.sent == (0 if devices == 1 else 8 * 8 * 4)
        assert benchmark_devices.nbytes_on_first(x) == x.nbytes / devices
