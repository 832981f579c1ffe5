"""NaN and infinity at inference, and `qjax.check`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.formats.spec import FORMATS


def bad_images() -> Any:
    x = small.images()
    x[0, 0, 0, 0], x[1] = np.nan, np.inf
    return x


def test_nan_stays_nan_and_infinity_is_clipped():
    q = small.quantized()
    good, found = (q.apply_fn(q.params, x) for x in (small.images(), bad_images()))
    assert np.all(np.isnan(found[0]))
    assert np.all(np.isfinite(found[1]))
    np.testing.assert_array_equal(found[2:], good[2:])


def test_integers_take_nan_for_zero_and_infinity_as_fake_quantization_does():
    q, x = small.quantized(), bad_images()
    run = qjax.integer(q)
    zeroed = np.where(np.isnan(x), np.float32(0), x)
    np.testing.assert_array_equal(run(q.params, x), run(q.params, zeroed))
    np.testing.assert_array_equal(run(q.params, x)[1:], q.apply_fn(q.params, x)[1:])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_keeps_nan(name: str):
    spec = qjax.QuantSpec(1 if name == "binary" else 4, format=name)
    one = jnp.ones((1, 1, 1), jnp.float32)
    format = spec.cover(-one, one)
    values = jnp.array([jnp.nan, 0.3, jnp.inf, -jnp.inf], jnp.float32).reshape(1, 4, 1)
    projected = np.ravel(format.project(values))
    assert np.isnan(projected[0])
    assert np.all(np.isfinite(projected[1:]))
    decoded = np.ravel(format.decode(format.encode(values)))
    np.testing.assert_array_equal(decoded[1:], projected[1:])


def test_a_range_found_at_run_time_is_that_of_the_finite_values():
    spec = qjax.QuantSpec(8, symmetric=False, granularity="per_tensor", ranges="dynamic")
    format = qjax.formats.dynamic.dynamic(spec, spec.limits)
    x = jnp.array([0.0, 2.55, jnp.nan, jnp.inf], jnp.float32)
    np.testing.assert_allclose(format.project(x), [0, 2.55, np.nan, 2.55], rtol=1e-4)


def test_check_counts_by_layer():
    q = small.quantized()
    assert qjax.check(q, small.images()).is_finite
    found = qjax.check(q, bad_images())
    conv, head = found.layers
    assert not found.is_finite
    assert (conv.name, conv.input, head.name) == ("conv", 1 + 72, "head")
    assert conv.output == 6 and head.input == 6 and head.output == 4 and found.outputs == 4
    assert conv.clipped >= 72 / bad_images().size and conv.saturated > 0
    assert "output not finite" in str(found) and str(found).splitlines()[-1].startswith("network")


def test_the_caller_may_change_arrays_afterwards():
    """What is left of the params are copies."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"]) ** 2 * params["slope"]

    w = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    params = {"w": w, "slope": np.float32([[1.0]])}
    x = np.linspace(0, 1, 32, dtype=np.float32).reshape(8, 4)
    q = qjax.quantize(apply_fn, params, x, small.CHEAP)
    before = np.array(q.apply_fn(q.params, x))
    params["slope"][:] = 7
    params["w"][:] = 7
    np.testing.assert_array_equal(q.apply_fn(q.params, x), before)
