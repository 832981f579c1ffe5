"""Training with quantized values: from a float network to a quantized one."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax

X = jnp.asarray(small.images())
PARAMS = small.make_params()
Y = small.apply_fn(PARAMS, X)
BINARY = dataclasses.replace(small.CHEAP, **{"weights": qjax.recipe(1).weights})
RECIPES: dict[str, qjax.Recipe] = {
    "lsq": qjax.recipe(3).naive(),
    "ste": qjax.recipe(3).naive(),
    "ste_gradients": qjax.recipe(3).naive(),
    "binary_connect": BINARY,
    "binary_connect_stochastic": BINARY,
    "binary_weights": BINARY,
    "xnor": dataclasses.replace(BINARY, inputs=qjax.recipe(1).inputs),
}


TRAINING = {"xnor": (120, 0.003)}  # steps and rate: one-bit inputs take smaller steps


def prepared(method: str, recipe: qjax.Recipe | None = None) -> qjax.qat.Trainable:
    return qjax.qat.prepare(small.apply_fn, PARAMS, X, method, recipe or RECIPES[method])


def loss_of(function: Any, key: Any = None) -> Any:
    return lambda params: jnp.mean((function(params, X, key) - Y) ** 2)


def trained(function: Any, params: Any, steps: int = 60, rate: float = 0.01) -> Any:
    gradient = jax.jit(jax.grad(loss_of(function)))
    for _ in range(steps):
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient(params))
        params = function.constrain(params)
    return params


def test_every_method_has_a_recipe_here():
    assert set(RECIPES) == set(qjax.qat.METHODS)


@pytest.mark.parametrize("method", ["lsq", "ste", "ste_gradients"])
@pytest.mark.parametrize("changes", [{}, {"outputs": None}, {"inputs": None, "outputs": None}])
def test_training_starts_at_the_quantized_network(method: str, changes: dict[str, Any]):
    recipe = dataclasses.replace(RECIPES[method], **changes)
    f, params = prepared(method, recipe)
    q = qjax.quantize(small.apply_fn, PARAMS, X, recipe)
    np.testing.assert_allclose(f(params, X), q.apply_fn(q.params, X), rtol=1e-5, atol=1e-6)
    if recipe.outputs is not None:
        np.testing.assert_array_equal(f(params, X), q.apply_fn(q.params, X))
    for name, layer in qjax.qat.finish(f, params, X).params["layers"].items():
        np.testing.assert_array_equal(layer.kernel, q.params["layers"][name].kernel)


@pytest.mark.parametrize("method", RECIPES)
def test_the_finished_network_is_the_trained_one_everywhere(method: str, tmp_path: Path):
    f, params = prepared(method)
    before = float(loss_of(f)(params))
    params = trained(f, params, *TRAINING.get(method, (60, 0.01)))
    assert float(loss_of(f)(params)) < 0.97 * before
    q = qjax.qat.finish(f, params, X)
    y = q.apply_fn(q.params, X)
    np.testing.assert_allclose(f(params, X), y, rtol=1e-5, atol=1e-5)
    small.assert_codes_agree(q, X)
    again = small.saved_and_loaded(q, tmp_path)
    assert list(again.report) == list(q.report)
    np.testing.assert_array_equal(again.apply_fn(again.params, X), y)
    unpacked = qjax.unpack(qjax.pack(q.params))
    chex.assert_trees_all_equal(unpacked, q.params, strict=True)
    assert qjax.cost(q).total.bit_operations == sum(
        record.macs * (record.weight_bits or 32) * (record.input_bits or 32) for record in q.report
    )
    text = str(qjax.explain(q, "conv", X[:1], PARAMS))
    assert "kernel codes" in text and ("input signs" in text) == (method == "xnor")


def test_learned_steps_move_and_the_others_stay():
    for method, moves in {"lsq": True, "ste": False}.items():
        f, params = prepared(method)
        after = trained(f, params, steps=3)
        for name, layer in params["layers"].items():
            for field in layer:
                is_same = bool(jnp.all(layer[field] == after["layers"][name][field]))
                assert is_same == (not moves and field.endswith("step")), (method, name, field)


def test_an_input_on_the_grid_of_the_output_before_has_no_step_of_its_own():
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (8, 8)) / 3 for i in range(3)}
    x = jax.random.normal(jax.random.key(9), (64, 8))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jax.nn.relu(x @ params[f"w{i}"])
        return x

    f, trainable = qjax.qat.prepare(apply_fn, params, x, "lsq", qjax.recipe(4))
    has_step = {name: "input_step" in layer for name, layer in trainable["layers"].items()}
    assert has_step == {"w0": True, "w1": False, "w2": False}
    stepped = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1.1 if path[-1].key == "output_step" else leaf, trainable
    )
    layers = qjax.qat.finish(f, stepped, x).params["layers"]
    assert float(layers["w1"].inputs.scale) == float(layers["w0"].outputs.scale)
    f, trainable = qjax.qat.prepare(apply_fn, params, x, "lsq", qjax.recipe(4, output_bits=6))
    assert all("input_step" in layer for layer in trainable["layers"].values())


def test_the_gradient_of_outputs_is_rounded_where_the_method_says_so():
    found = {}
    for method in ("ste", "ste_gradients"):
        f, params = prepared(method)
        found[method] = jax.grad(loss_of(f))(params)["layers"]["head"]["bias"]
    assert bool(jnp.any(found["ste"] != found["ste_gradients"]))
    np.testing.assert_allclose(found["ste"], found["ste_gradients"], rtol=0.2, atol=1e-3)


def test_a_key_makes_a_stochastic_method_random_and_the_others_not():
    for method, is_random in {"binary_connect_stochastic": True, "binary_connect": False}.items():
        f, params = prepared(method)
        a, b, none = (f(params, X, key) for key in (*jax.random.split(jax.random.key(0)), None))
        assert bool(jnp.all(a == b)) != is_random
        assert bool(jnp.all(a == none)) != is_random


def test_binary_connect_keeps_its_kernels_within_one():
    f, params = prepared("binary_connect")
    far = jax.tree.map(lambda leaf: leaf * 30, params)
    kept = f.constrain(far)["layers"]["conv"]
    assert float(jnp.abs(kept["kernel"]).max()) == 1.0
    np.testing.assert_array_equal(kept["bias"], far["layers"]["conv"]["bias"])


def test_a_negative_slope_turns_the_codes():
    f, params = prepared("binary_connect")
    turned = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if path[-1].key == "slope" else leaf, params
    )
    q = qjax.qat.finish(f, turned, X)
    np.testing.assert_allclose(q.apply_fn(q.params, X), f(turned, X), rtol=1e-5, atol=1e-5)
    assert all(bool(jnp.all(layer.weights.scale > 0)) for layer in q.params["layers"].values())


def test_params_that_are_no_floats_stay_as_they_are():
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "order": jnp.array([2, 0, 1])}
    x = jax.random.normal(jax.random.key(1), (16, 4))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["w"])[:, params["order"]]

    f, trainable = qjax.qat.prepare(apply_fn, params, x, "lsq", small.CHEAP)
    gradient = jax.grad(lambda p: jnp.sum(f(p, x) ** 2))(trainable)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, trainable)
    q = qjax.qat.finish(f, trainable, x)
    np.testing.assert_allclose(q.apply_fn(q.params, x), f(trainable, x), rtol=1e-5, atol=1e-5)


DYNAMIC = dataclasses.replace(
    qjax.recipe(8),
    inputs=qjax.QuantSpec(symmetric=False, granularity="per_tensor", ranges="dynamic"),
)
CHANNELS = qjax.recipe(8, activation_granularity="per_channel")


@pytest.mark.parametrize(
    ("method", "recipe", "message"),
    [
        ("adam", None, "`method` must be one of lsq, ste, .*; got 'adam'"),
        ("xnor", qjax.recipe(8), "xnor trains kernels of one bit, and the recipe has none"),
        ("xnor", BINARY, "'conv' has inputs of 8 bits. Use input_bits=1, or the method binary_w"),
        ("lsq", qjax.recipe(8, fixed_point=True), "weights with scales power_of_two, which train"),
        ("lsq", DYNAMIC, "has inputs of dynamic ranges, which have no step to train"),
        ("lsq", CHANNELS, "has inputs per_channel, which cannot be trained"),
    ],
)
def test_what_cannot_be_trained_is_refused(method: str, recipe: Any, message: str):
    with pytest.raises(ValueError, match=message):
        qjax.qat.prepare(small.apply_fn, PARAMS, X, method, recipe)


def test_a_network_that_training_broke_is_refused():
    f, params = prepared("lsq")
    params["layers"]["head"]["bias"] = jnp.full(4, jnp.nan)
    with pytest.raises(ValueError, match=r"`params` must be finite; .*head.*bias.* holds NaN"):
        qjax.qat.finish(f, params, X)


def test_recipe_and_bits_together_are_refused():
    with pytest.raises(ValueError, match="`recipe` and `bits` were both given"):
        qjax.qat.prepare(small.apply_fn, PARAMS, X, "lsq", RECIPES["lsq"], bits=3)
