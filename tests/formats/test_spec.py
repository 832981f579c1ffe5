"""Descriptions of formats: code ranges, and what a user gets told."""

from typing import Any

import pytest

from qjax import QuantSpec
from qjax.formats.spec import MAX_BITS, MIN_BITS


@pytest.mark.parametrize("bits", range(MIN_BITS + 1, MAX_BITS + 1))
def test_code_range(bits: int):
    signed, unsigned = QuantSpec(bits), QuantSpec(bits, symmetric=False)
    assert signed.qmin == -signed.qmax, "symmetric codes have no lonely least one"
    assert signed.qmax - signed.qmin + 1 == 2**bits - 1
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)


def test_code_range_at_8_bits():
    assert (QuantSpec().qmin, QuantSpec().qmax) == (-127, 127)


@pytest.mark.parametrize("bits", [17, 0, -8, 8.0, "8", True, None])
def test_width_out_of_range_is_refused(bits: Any):
    message = rf"`bits` must be an integer from 1 to 16; got {bits!r}"
    with pytest.raises(ValueError, match=message):
        QuantSpec(bits)


def test_spec_refuses_an_unknown_granularity_and_an_empty_group():
    with pytest.raises(ValueError, match="`granularity` must be one of per_tensor, per_channel"):
        QuantSpec(granularity="per_row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`group_size` must be at least 1; got 0"):
        QuantSpec(granularity="per_group", group_size=0)
