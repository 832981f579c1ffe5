"""Programs compiled in two threads, from both ends: each once, and with the same results."""

import threading
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax.fit import layerwise
from qjax.programs import program
from qjax.threads import compiled_from_both_ends, side_by_side


@program(static_argnums=0)
def _power(exponent: int, x: jax.Array) -> jax.Array:
    return x**exponent


def powers(x: Any) -> Any:
    for exponent in range(2, 8):
        x = _power(exponent, x)
    return x


def test_each_program_is_compiled_once_whichever_thread_does_it(programs_compiled: list[str]):
    powers(jnp.ones(3))  # tries the options of the compiler
    x = jnp.ones(17)
    programs_compiled.clear()
    rehearsed = threading.Event()

    def rehearse() -> None:
        powers(jax.ShapeDtypeStruct(x.shape, x.dtype))
        rehearsed.set()

    with compiled_from_both_ends(rehearse):
        rehearsed.wait()
        found = powers(x)
    assert len(programs_compiled) == 6
    np.testing.assert_array_equal(found, np.ones(17))


def test_what_is_wrong_while_compiling_ahead_is_told_and_changes_nothing():
    def rehearse() -> None:
        raise OSError("no compiler")

    with pytest.warns(RuntimeWarning, match="no compiler"):
        with compiled_from_both_ends(rehearse):
            found = powers(jnp.ones(18))
    np.testing.assert_array_equal(found, np.ones(18))


def test_an_error_ends_the_other_thread():
    def rehearse() -> None:
        for size in range(10**6):
            powers(jax.ShapeDtypeStruct((size,), np.float32))

    with pytest.raises(KeyError, match="stop"):
        with compiled_from_both_ends(rehearse):
            raise KeyError("stop")
    for thread in threading.enumerate():
        if thread.name == "compiling":
            thread.join(30)
            assert not thread.is_alive()


def test_one_core_and_two_give_the_same_codes_by_the_same_programs(
    programs_compiled: list[str], monkeypatch: pytest.MonkeyPatch
):
    found = {}
    for cores in (1, 2):
        jax.clear_caches()
        monkeypatch.setattr(layerwise, "cores", lambda cores=cores: cores)
        programs_compiled.clear()
        q = qjax.quantize(small.apply_fn, small.make_params(), small.images(), bits=4)
        found[cores] = q, Counter(programs_compiled)
    (alone, by_one), (helped, by_two) = found[1], found[2]
    assert by_one.keys() == {"MainThread"} and by_two["compiling"] > 0
    assert by_one.total() == by_two.total()
    jax.tree.map(np.testing.assert_array_equal, alone.params, helped.params)


def test_functions_side_by_side_compile_no_program_twice(programs_compiled: list[str]):
    powers(jnp.ones(3))  # tries the options of the compiler
    x = jnp.ones(19)
    programs_compiled.clear()
    found = side_by_side([partial(powers, x)] * 4)
    assert len(programs_compiled) == 6
    for each in found:
        np.testing.assert_array_equal(each, np.ones(19))


def test_an_error_in_one_of_several_functions_is_raised():
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1, lambda: 1 // 0])


@program()
def _with_a_program_of_constants(x: jax.Array) -> jax.Array:
    return x + _power(2, jnp.arange(3.0))


def test_a_program_that_calls_another_on_constants_is_compiled_ahead():
    shape: Any = jax.ShapeDtypeStruct((3,), np.float32)
    with compiled_from_both_ends(lambda: _with_a_program_of_constants(shape)):
        found = _with_a_program_of_constants(jnp.zeros(3))
    np.testing.assert_array_equal(found, [0, 1, 4])


def test_contexts_of_the_first_thread_leave_the_second_idle(programs_compiled: list[str]):
    with jax.enable_x64(True):
        x = jnp.ones(20, jnp.float64)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        programs_compiled.clear()
        with compiled_from_both_ends(lambda: powers(shape)):
            found = powers(x)
    assert found.dtype == np.float64 and set(programs_compiled) == {"MainThread"}
