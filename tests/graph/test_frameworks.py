"""Objects of frameworks that are passed as they are: errors that show the lines to write."""

import pathlib
import re
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import pytest
from flax import nnx

import qjax
from qjax.graph.frameworks import FRAMEWORKS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "frameworks.md"
X = jax.ShapeDtypeStruct((2, 6), jnp.float32)
PARAMS = {"w": jnp.ones((6, 3))}
KEY = jax.random.key(0)
VARIABLE = keras.Variable(jnp.ones((6, 3)), name="kernel")
KERAS = keras.layers.Dense(3)
EQUINOX = eqx.filter_eval_shape(eqx.nn.MLP, 6, 3, 8, depth=1, key=KEY)
NNX = nnx.eval_shape(lambda: nnx.Linear(6, 3, rngs=nnx.Rngs(0)))


def call(params: Any, x: Any) -> Any:
    return params(x)


NO_FUNCTION = "`apply_fn` must be a function of (params, x)"
NO_ARRAYS = "`params` must hold arrays"
# What is passed, which argument is said to be wrong, and what it is said to be.
MISTAKES: dict[str, tuple[Any, Any, str, str]] = {
    "linen": (nn.Dense(3), PARAMS, NO_FUNCTION, "Dense, a module of Flax Linen"),
    "linen class": (nn.Dense, PARAMS, NO_FUNCTION, "Dense, a module of Flax Linen"),
    "linen params": (call, nn.Dense(3), NO_ARRAYS, "Dense, a module of Flax Linen"),
    "nnx": (NNX, PARAMS, NO_FUNCTION, "Linear, a module of Flax NNX"),
    "nnx graphdef": (call, nnx.split(NNX)[0], NO_ARRAYS, "GraphDef, a graphdef of Flax NNX"),
    "equinox": (EQUINOX, PARAMS, NO_FUNCTION, "MLP, a module of Equinox"),
    "equinox params": (call, EQUINOX, NO_ARRAYS + "; found .* at 'activation'", "MLP, a module"),
    "equinox inside": (call, [EQUINOX], NO_ARRAYS + "; found .* at '0/activation'", "MLP, a"),
    "haiku": (hk.transform(call), PARAMS, NO_FUNCTION, "Transformed, a pair of functions of Haiku"),
    "haiku state": (
        *(hk.transform_with_state(call), PARAMS),
        *(NO_FUNCTION, "TransformedWithState, a pair of functions of Haiku"),
    ),
    "haiku class": (hk.Linear, PARAMS, NO_FUNCTION, "Linear, a module of Haiku"),
    "keras": (KERAS, PARAMS, NO_FUNCTION, "Dense, a model of Keras"),
    "keras params": (call, KERAS, NO_ARRAYS, "Dense, a model of Keras"),
    "keras variables": (call, [VARIABLE], NO_ARRAYS + "; found Variable at '0'", "a variable of"),
    "keras by path": (call, {"kernel": VARIABLE}, NO_ARRAYS, "Variable, a variable of Keras"),
}


@pytest.mark.parametrize("transform", [qjax.trace, qjax.quantize, qjax.qat.prepare])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_object_of_a_framework_is_answered_by_the_lines_to_write(mistake: str, transform: Any):
    apply_fn, params, problem, what = MISTAKES[mistake]
    problem = problem.replace("(params, x)", r"\(params, x\)")
    with pytest.raises(TypeError, match=f"{problem}.*{what}.*Write:") as caught:
        transform(apply_fn, params, X)
    message = str(caught.value)
    [lines] = {f.lines for f in FRAMEWORKS if f.lines in message}
    assert message.endswith(f"\n\n{lines}\n") and f" of {framework_of(lines)}." in message


def framework_of(lines: str) -> str:
    [name] = [framework.name for framework in FRAMEWORKS if framework.lines == lines]
    return name


def test_the_page_runs_the_lines_that_errors_show():
    code = [re.sub(r"^(>>>|\.\.\.) ", "", line) for line in PAGE.read_text("utf-8").splitlines()]
    for framework in FRAMEWORKS:
        lines = framework.lines.splitlines()
        starts = [i for i, line in enumerate(code) if line == lines[0]]
        assert any([c for c in code[i:] if c in lines][: len(lines)] == lines for i in starts)


def test_modules_that_hold_arrays_only_are_params():
    linear = eqx.filter_eval_shape(eqx.nn.Linear, 6, 3, key=KEY)
    assert len(qjax.trace(lambda model, x: jax.vmap(model)(x), linear, X)) == 1
    assert len(qjax.trace(lambda model, x: model(x), NNX, X)) == 1


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, eqx.filter_jit])
def test_a_function_that_fails_keeps_its_error(wrap: Any):
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        qjax.trace(wrap(apply_fn), PARAMS, X)
