"""Pickling a quantized network."""

import copy
import pickle

import numpy as np
import pytest
import small

import qjax


def test_a_pickled_network_computes_the_same():
    q, x = small.quantized(), small.images(4)
    expected = np.asarray(q.apply_fn(q.params, x))  # traced, which is not pickled
    read = pickle.loads(pickle.dumps(q))
    np.testing.assert_array_equal(read.apply_fn(read.params, x), expected)
    assert read.apply_fn == q.apply_fn and read.report == q.report
    assert read.apply_fn.input == q.apply_fn.input is not None


def test_a_function_without_a_name_is_refused_and_can_be_copied():
    x = small.images(4)
    q = qjax.quantize(
        lambda params, x: small.apply_fn(params, x), small.make_params(), x, small.CHEAP
    )
    with pytest.raises(TypeError, match=r"pickled with its `apply_fn`.*use qjax\.save\(path, q\)"):
        pickle.dumps(q)
    copied = copy.deepcopy(q)
    np.testing.assert_array_equal(copied.apply_fn(copied.params, x), q.apply_fn(q.params, x))
