"""Strict JAX for every test: no silent dtype or rank promotion; four CPU devices for sharding."""

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)

# The first example of a property compiles and the others do not, so no example has a deadline.
# The same examples every run: what fails here fails everywhere.
hypothesis.settings.register_profile("qjax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("qjax")


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """Four CPU devices along one axis, `data`."""
    return jax.make_mesh((4,), ("data",), devices=jax.devices("cpu"))
