"""Packing: every code comes back, at its true width in between."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qjax import QParams
from qjax.formats.packing import codes_at, pack_codes, unpack_positions


@given(st.integers(2, 16), st.booleans(), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_code_comes_back(bits: int, is_signed: bool, count: int, seed: int):
    low = -(2 ** (bits - 1)) if is_signed else 0
    qparams = QParams(jnp.ones(()), jnp.zeros((), jnp.int32), low, low + 2**bits - 1)
    codes = np.random.default_rng(seed).integers(low, qparams.qmax, count, endpoint=True)
    codes[0] = qparams.qmax
    codes = jnp.asarray(codes.reshape(1, count, 1), qparams.dtype)
    stream = pack_codes(codes, qparams.lowest, bits)
    assert stream.dtype == jnp.uint8
    assert stream.size == -(-count * bits // 8)
    found = codes_at(unpack_positions(stream, bits, codes.shape), qparams)
    assert found.dtype == codes.dtype
    np.testing.assert_array_equal(found, codes)


def test_four_bit_codes_go_two_to_a_byte_the_first_one_lowest():
    assert pack_codes(jnp.array([1, 2, 3]), 0, 4).tolist() == [0x21, 0x03]
