"""Networks whose kernels are held at their true width."""

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.run.packed import PackedCodes


def test_a_packed_network_is_smaller_and_computes_the_same():
    def apply_fn(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"] + params["shift"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": jax.random.normal(keys[0], (64, 32)),
        "second": jax.random.normal(keys[1], (32, 8)),
        "shift": jnp.ones((4, 8)),
    }
    x = jax.random.normal(keys[2], (4, 64))
    recipe = qjax.recipe(8, overrides={"first": {"weight_bits": 3}, "second": {"weights": None}})
    q = qjax.quantize(apply_fn, params, x, recipe)
    packed = qjax.pack(q.params)
    kernel = packed["layers"]["first"].kernel
    assert isinstance(kernel, PackedCodes)
    assert kernel.stream.nbytes == 64 * 32 * 3 // 8
    run = qjax.integer(q)
    for function in (q.apply_fn, run):
        found = jax.jit(lambda packed, x, f=function: f(qjax.unpack(packed), x))(packed, x)
        np.testing.assert_array_equal(found, function(q.params, x))
