"""Tests of arguments that are laid end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.integer.arguments import packed

TREE = {
    "kernel": jnp.arange(12, dtype=jnp.int8).reshape(3, 4),
    "scales": [jnp.float32(0.5), np.float32(2.0), jnp.arange(3.0)],
    "limits": (np.int32(-7), jnp.int32(7)),
    "none": None,
    "empty": jnp.zeros((0, 2)),
}


@pytest.mark.parametrize("most", [0, 4, 100])
def test_what_is_packed_is_unpacked(most: int):
    layout, arrays = packed(TREE, most)
    found = jax.jit(layout.unpacked)(arrays)
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for given, after in zip(jax.tree.leaves(TREE), jax.tree.leaves(found), strict=True):
        assert (after.dtype, after.shape) == (given.dtype, np.shape(given))
        np.testing.assert_array_equal(after, given)


@pytest.mark.parametrize(("most", "count"), [(0, 7), (4, 3), (100, 3)])
def test_small_arrays_of_a_type_are_one(most: int, count: int):
    assert len(packed(TREE, most)[1]) == count


def test_layouts_of_equal_trees_are_equal():
    first, second = (packed(jax.tree.map(jnp.copy, TREE), 100)[0] for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != packed(TREE, 4)[0]


@pytest.mark.parametrize("leaf", [2.0, jnp.asarray(2.0), jax.random.key(0), np.float64(2.0)])
def test_arrays_that_would_change_are_left_alone(leaf: object):
    layout, arrays = packed([leaf], 100)
    assert list(arrays.values()) == [leaf]
    assert layout.unpacked(arrays) == [leaf]


def test_a_network_takes_few_arrays():
    q, x = small.quantized(), small.images()
    _, _, arrays = qjax.integer(q)._prepared(q.apply_fn.network(x), q.params, False)
    assert len(arrays) < len(jax.tree.leaves(q.params)) / 3
