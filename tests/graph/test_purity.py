"""A network that draws random numbers, keeps state or has effects is refused; others are not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qjax.graph.layers import find_layers, shapes_of
from qjax.graph.purity import check_pure

X = jax.ShapeDtypeStruct((4, 3), jnp.float32)
PARAMS = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)}
TABLE = np.arange(6, dtype=np.float32).reshape(3, 2)
generator = np.random.default_rng(0)


class Network(nn.Module):
    """Dense layers, batch norm and dropout."""

    is_training: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not self.is_training)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not self.is_training)(x))


def check(apply_fn: Callable[[Any, Any], Any], params: Any = PARAMS) -> None:
    check_pure(apply_fn, params, X, find_layers(apply_fn, params, X))


def drawn(params: Any, x: jax.Array) -> jax.Array:
    return (x + jax.random.normal(jax.random.key(0), x.shape)) @ params["w"]


def nested(params: Any, x: jax.Array) -> jax.Array:
    return jax.jit(drawn)(params, x)


def printed(params: Any, x: jax.Array) -> jax.Array:
    jax.debug.print("{}", x)
    return x @ params["w"]


def literal(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] * generator.random()


def constant(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] + generator.normal(size=(4, 2)).astype(np.float32)


def pure(params: Any, x: jax.Array) -> jax.Array:
    unused = jax.random.normal(jax.random.key(0), x.shape)
    del unused
    return x @ (params["w"] + TABLE)


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    [
        (drawn, r"draws random numbers \(`random_"),
        (nested, r"draws random numbers \(`random_"),
        (printed, r"has an effect \(`debug_"),
        (literal, "another function every time it is traced"),
        (constant, "another function every time it is traced"),
    ],
)
def test_what_is_not_pure_is_refused(apply_fn: Callable[[Any, Any], Any], message: str):
    with pytest.raises(ValueError, match=message):
        check(apply_fn)


def test_what_is_pure_passes_and_is_remembered():
    check(pure)
    network = find_layers(pure, PARAMS, X)

    def fail(params: Any, x: Any) -> None:
        raise AssertionError("traced again")

    check_pure(fail, PARAMS, X, network)


@pytest.mark.parametrize("is_training", [False, True])
def test_networks_in_training_are_refused(is_training: bool):
    module = Network(is_training)
    key = jax.random.key(0)
    variables = jax.eval_shape(Network(False).init, key, X)

    def apply_fn(variables: Any, x: jax.Array) -> Any:
        if not is_training:
            return module.apply(variables, x)
        return module.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})

    if is_training:
        with pytest.raises(ValueError, match="draws random numbers .* deterministic=True"):
            check(apply_fn, variables)
    else:
        check(apply_fn, variables)


def test_updated_state_is_refused():
    norm = nn.BatchNorm(use_running_average=False)
    variables = shapes_of(jax.eval_shape(norm.init, jax.random.key(0), X))
    variables["params"]["w"] = jax.ShapeDtypeStruct((3, 3), jnp.float32)

    def apply_fn(variables: Any, x: jax.Array) -> Any:
        return norm.apply(variables, x @ variables["params"]["w"], mutable=["batch_stats"])

    with pytest.raises(ValueError, match="returns 'batch_stats/mean' of `params`"):
        check(apply_fn, variables)


def normalized(axes: int | tuple[int, ...]) -> Callable[[Any, Any], Any]:
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
        return x @ params["w"]

    return apply_fn


def test_examples_that_are_mixed_are_refused():
    with pytest.raises(ValueError, match="mixes the examples of a batch.*`reduce_sum`"):
        check(normalized(0))
    check(normalized(1))


def test_a_reduction_over_an_axis_as_long_as_the_batch_passes():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        steps = jnp.stack([x, x, 2 * x, x])  # [4 steps, 4 examples, 3]
        return steps.mean(0) @ params["w"]

    check(apply_fn)


def test_a_result_over_all_examples_that_no_layer_reads_passes():
    def apply_fn(params: Any, x: jax.Array) -> Any:
        logits = x @ params["w"]
        return logits, logits.mean(0)

    check(apply_fn)


def test_batch_norm_in_training_without_its_state_is_refused():
    norm = nn.BatchNorm(use_running_average=False)
    variables = jax.eval_shape(norm.init, jax.random.key(0), X)

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x, _ = norm.apply(params["norm"], x, mutable=["batch_stats"])
        return x @ params["w"]

    with pytest.raises(ValueError, match=r"mixes the examples.*train=False"):
        check(apply_fn, {"norm": variables, **PARAMS})
