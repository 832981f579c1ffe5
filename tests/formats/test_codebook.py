"""What holds for every format that is not uniform: the laws of a format, and a network in it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import qjax
from qjax import QuantSpec
from qjax.fit.layer import round_kernel
from qjax.fit.search import Candidates
from qjax.formats.affine import AFFINE
from qjax.formats.base import Format, elementwise
from qjax.formats.binary import BINARY
from qjax.formats.packing import pack_kernel, unpack_kernel
from qjax.formats.spec import FORMATS
from qjax.objectives.errors import OUTPUT_MSE
from qjax.rounding.gptq import GPTQ
from qjax.rounding.nearest import NEAREST

NAMES = [name for name, family in FORMATS.items() if family not in (AFFINE, BINARY)]
CASES = [(name, b) for name in NAMES for b in (2, 4, 5, 8) if b in FORMATS[name].widths]
FIXED = [(name, bits) for name, bits in CASES if name != "kmeans"]
INTEGER = ["power_of_two", "apot"]

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(20, 20)) / np.sqrt(20) + np.eye(20)  # correlated inputs: GPTQ pays
X = jnp.asarray(RNG.normal(size=(64, 20)) @ MIX, jnp.float32)
KERNEL = RNG.normal(size=(20, 6)).astype(np.float32) / 4
KERNEL[:, 2] = 0
PARAMS = {"w": jnp.asarray(KERNEL)}


def network(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"])


def spec_of(name: str, bits: int, **fields: Any) -> QuantSpec:
    return QuantSpec(bits, format=name, **fields)


def table(format: Any) -> np.ndarray:
    """All values of a format of one scale, ascending."""
    levels = np.asarray(format.levels, np.float32).ravel()
    return levels if format.name == "kmeans" else levels * float(np.ravel(format.scale)[0])


def covering(name: str, bits: int, low: float = -3.0, high: float = 2.0) -> Any:
    return spec_of(name, bits).cover(jnp.full((1, 1, 1), low), jnp.full((1, 1, 1), high))


def test_the_table_has_them_all():
    assert sorted(NAMES) == ["apot", "kmeans", "nf4", "power_of_two", "quantile"]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_it_is_a_format_of_its_width_that_covers_the_range(name: str, bits: int):
    format = covering(name, bits)
    values = table(format)
    assert isinstance(format, Format) and format.name == name
    assert format.bits == bits and 2**bits - 1 <= len(values) <= 2**bits
    assert np.all(np.diff(values) >= 0) and values[0] <= 0 <= values[-1]
    np.testing.assert_allclose((values[0], values[-1]), (-3, 3), rtol=1e-6)


@pytest.mark.parametrize(("name", "bits"), FIXED)
def test_a_fixed_table_holds_zero(name: str, bits: int):
    format = covering(name, bits)
    assert 0 in table(format)
    np.testing.assert_array_equal(format.project(jnp.zeros((1, 1, 1))), 0)


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6))
def test_values_are_rounded_to_the_nearest_level(name: str, given_values: list[float]):
    format = covering(name, 4)
    x = jnp.float32(given_values).reshape(1, -1, 1)
    found = np.asarray(format.project(x))
    distances = np.abs(np.float32(given_values)[:, None] - table(format)[None])
    np.testing.assert_allclose(np.abs(found - x).ravel(), distances.min(1), atol=1e-6)
    np.testing.assert_array_equal(format.decode(format.encode(x)), found)
    np.testing.assert_array_equal(format.project(jnp.asarray(found)), found)
    doubled = format.scaled(jnp.full((1, 1, 1), 2.0))
    np.testing.assert_array_equal(doubled.project(2 * x), 2 * found)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_passes_straight_through(name: str):
    format = covering(name, 4)
    gradient = jax.grad(lambda x: jnp.sum(format.project(x) * 3))(jnp.full((1, 2, 1), 0.3))
    np.testing.assert_array_equal(gradient, 3)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_codes_are_packed_at_their_width(name: str, bits: int):
    format = covering(name, bits)
    values = jnp.concatenate([jnp.asarray(table(format)), jnp.array([0.1, -0.3, 1.7])])
    codes = format.encode(values.reshape(1, -1, 1))
    assert codes.dtype == format.dtype
    stream = pack_kernel(codes, format)
    assert stream.nbytes == -(-codes.size * bits // 8)
    found = unpack_kernel(stream, format, bits, codes.shape)
    chex.assert_trees_all_equal(found, codes, strict=True)


@functools.cache
def quantized(name: str) -> qjax.Quantized:
    bits = 4 if name == "nf4" else 3
    recipe = qjax.recipe(8, weight_bits=bits, weight_format=name).naive()
    return qjax.quantize(network, PARAMS, X, recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_takes_it(name: str, tmp_path: Path):
    q = quantized(name)
    layer, record = q.params["layers"]["w"], q.report[0]
    logits = q.apply_fn(q.params, X)
    assert float(qjax.sqnr_db(network(PARAMS, X), logits)) > 8
    assert layer.weights.name == name and record.weight_bits == layer.weights.bits

    values = np.asarray(layer.weights.decode(layer.kernel))
    np.testing.assert_array_equal(values[..., 2], 0)  # the channel that is dead
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(layer.weights))

    codes, limits = -(-20 * 6 * layer.weights.bits // 8), 8 * layer.weights.is_uniform
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.weights)) - limits
    assert record.bytes_quantized == codes + weights + layer.bias.nbytes + 2 * 8

    packed = qjax.pack(q.params)
    assert packed["layers"]["w"].kernel.stream.nbytes == codes
    run = jax.jit(lambda packed, x: q.apply_fn(qjax.unpack(packed), x))
    np.testing.assert_array_equal(run(packed, X), logits)

    qjax.save(tmp_path / "model", q)
    stored = load_file(next((tmp_path / "model").glob("model-*.safetensors")))
    assert stored["layers/w/kernel"].nbytes == codes
    again = qjax.load(tmp_path / "model", network)
    chex.assert_trees_all_equal(again.params, q.params, strict=True)
    chex.assert_trees_all_equal(again.apply_fn(again.params, X), logits, strict=True)
    assert list(again.report) == list(q.report)
    assert again.report.recipe.to_json() == q.report.recipe.to_json()


@pytest.mark.parametrize(
    ("name", "number"), [("kmeans", "uint3"), ("power_of_two", "int8 of 3 bits")]
)
def test_a_layer_is_explained(name: str, number: str):
    steps = qjax.explain(quantized(name), "w", X[:1], PARAMS).steps
    codes = next(step for step in steps if step.name == "kernel codes")
    assert codes.number == number and codes.bits == 3
    assert f"the code of {name} nearest to w / " in codes.equation


@pytest.mark.parametrize("name", INTEGER)
def test_multiples_of_a_scale_run_in_integers(name: str):
    q = quantized(name)
    np.testing.assert_array_equal(qjax.integer(q)(q.params, X), q.apply_fn(q.params, X))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(INTEGER)))
def test_other_values_have_no_integers(name: str):
    message = f"layer 'w' has weights in the format {name}, .*use `q.apply_fn`, or quantize with w"
    with pytest.raises(ValueError, match=message):
        qjax.integer(quantized(name))


@pytest.mark.parametrize(("name", "bits"), [("power_of_two", 5), ("apot", 8)])
def test_codes_of_16_bits_run_in_integers(name: str, bits: int):
    recipe = qjax.recipe(4, weights=spec_of(name, bits)).naive()
    q = qjax.quantize(network, PARAMS, X, recipe)
    assert q.params["layers"]["w"].kernel.dtype == jnp.int16
    for arithmetic in ("float", "fixed_point"):
        found = qjax.integer(q, arithmetic=arithmetic)(q.params, X)
        np.testing.assert_allclose(found, q.apply_fn(q.params, X), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("kmeans", "per_tensor"), ("kmeans", "per_group"), ("apot", "per_group")],
)
def test_gptq_and_sweeps_lower_the_output_error(name: str, granularity: Any):
    spec = spec_of(name, 3, granularity=granularity, group_size=8)
    kernel, hessian = jnp.asarray(KERNEL)[None], (X.T @ X / len(X))[None]
    losses = []
    for rounding, sweeps in ((NEAREST, 0), (GPTQ, 0), (GPTQ, 2)):
        rounded = round_kernel(
            kernel,
            hessian,
            spec.limits,
            spec=spec,
            objective=OUTPUT_MSE,
            rounding=rounding,
            sweeps=sweeps,
            candidates=Candidates(16, 0),
        )
        error = elementwise(rounded.format, 20).decode(rounded.codes)[0] - KERNEL
        losses.append(float(jnp.sum(error * (hessian[0] @ error))))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantSpec(8, format="nf4"), "`bits` must be 4 in the format nf4; got 8"),
        (lambda: QuantSpec(9, format="kmeans"), "`bits` must be from 2 to 8 in the format kmeans"),
        (lambda: qjax.recipe(1, weight_format="apot"), "must be from 2 to 8 in the format apot"),
        (
            lambda: qjax.recipe(8, weight_format="octal"),
            "`weight_format` must be one of uniform, .*nf4.*; got 'octal'",
        ),
        (
            lambda: qjax.recipe(8, inputs=spec_of("kmeans", 8, granularity="per_tensor")),
            "`inputs` must have a uniform format; got kmeans, which is for weights. Use format='un",
        ),
        (
            lambda: qjax.recipe(8, outputs=spec_of("apot", 8, granularity="per_tensor")),
            "`outputs` must have a uniform format; got apot, which is for weights",
        ),
        (
            lambda: qjax.qat.prepare(
                network, PARAMS, X, "lsq", qjax.recipe(4, weight_format="apot")
            ),
            "layer 'w' has weights in the format apot, which has no step to train; use the",
        ),
    ],
)
def test_what_has_no_form_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_recipes_name_it():
    recipe = qjax.recipe(
        8,
        weight_bits=3,
        weight_format="kmeans",
        first_last_bits=8,
        overrides={
            "b": {"weight_format": "nf4", "weight_bits": 4},
            "c": {"weight_format": "apot"},
            "d": {"weight_format": "uniform", "bits": 2},
        },
    )
    layers = recipe.by_layer(list("abcde")).values()
    found = [layer.weights and (layer.weights.family.name, layer.weights.bits) for layer in layers]
    assert found == [("kmeans", 8), ("nf4", 4), ("apot", 3), ("uniform", 2), ("kmeans", 8)]
    assert qjax.Recipe.from_json(recipe.to_json()) == recipe
    plain = qjax.recipe(8, weight_format="uniform")
    assert plain == qjax.recipe(8) and "format" not in plain.to_json()["weights"]
    assert dataclasses.replace(qjax.recipe(8), overrides={"a": {"weight_format": "apot"}})
