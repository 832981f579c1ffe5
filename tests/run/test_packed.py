"""Packing: every code comes back, at its true width in between."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import qjax
from qjax.formats.affine import QParams
from qjax.run.packed import PackedCodes, pack_codes, unpack_codes


@given(st.integers(2, 16), st.booleans(), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_code_comes_back(bits: int, is_signed: bool, count: int, seed: int):
    low = -(2 ** (bits - 1)) if is_signed else 0
    qparams = QParams(jnp.ones(()), jnp.zeros((), jnp.int32), low, low + 2**bits - 1)
    codes = np.random.default_rng(seed).integers(low, qparams.qmax, count, endpoint=True)
    codes[0] = qparams.qmax
    codes = jnp.asarray(codes, qparams.dtype).reshape(1, count, 1)
    stream = pack_codes(codes, qparams)
    assert stream.dtype == jnp.uint8
    assert stream.size == -(-count * bits // 8)
    found = unpack_codes(stream, qparams, codes.shape)
    assert found.dtype == codes.dtype
    np.testing.assert_array_equal(found, codes)


def test_four_bit_codes_go_two_to_a_byte_the_first_one_lowest():
    qparams = QParams(jnp.ones(()), jnp.zeros((), jnp.int32), 0, 15)
    assert pack_codes(jnp.array([1, 2, 3]), qparams).tolist() == [0x21, 0x03]


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
