"""Integers for real: accumulators equal NumPy in int64, codes those of fake quantization."""

import functools
import re
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import models
import numpy as np
import operations
import pytest
from hypothesis import strategies as st

import qjax
from qjax import QParams
from qjax.graph.operation import Linear
from qjax.integer import chunks, lowerings
from qjax.integer.lowerings import DOT, LOWERINGS, Lowering
from qjax.integer.pairs import has_pairs
from qjax.integer.requantize import ARITHMETICS
from qjax.run.layer import QuantizedLayer

# ---- Accumulators of every kind of layer


def random_layer(operation: Linear, weight_bits: int, input_bits: int, seed: int) -> Any:
    """A layer of random codes."""
    rng = np.random.default_rng(seed)
    groups, _, channels = operation.matrix_shape
    weights = qjax.QuantSpec(weight_bits)
    inputs = qjax.QuantSpec(input_bits, symmetric=False, granularity="per_tensor")
    kernel_q = rng.integers(weights.qmin, weights.qmax, operation.matrix_shape, endpoint=True)
    ones = jnp.ones((groups, 1, channels))
    kernel_qparams = QParams(ones, jnp.zeros_like(ones, jnp.int32), weights.qmin, weights.qmax)
    zero_point = jnp.int32(rng.integers(0, inputs.qmax, endpoint=True))
    input_qparams = QParams(jnp.float32(1), zero_point, inputs.qmin, inputs.qmax)
    return QuantizedLayer(
        jnp.asarray(kernel_q, kernel_qparams.dtype),
        jnp.asarray(rng.integers(-1000, 1000, groups * channels), jnp.int32),
        kernel_qparams,
        input_qparams,
        None,
        None,
    )


def in_int64(operation: Linear, layer: QuantizedLayer, centered: np.ndarray) -> np.ndarray:
    """Σ q_w·(q_x − z_x) + q_b, int64[positions, groups, channels]."""
    patches = operations.patches(operation, jnp.asarray(centered, jnp.float32))
    patches = np.asarray(patches).astype(np.int64)
    acc = np.einsum("pgk,gkm->pgm", patches, np.asarray(layer.kernel, np.int64))
    return acc + np.asarray(layer.bias, np.int64).reshape(acc.shape[1:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def accumulated(operation: Linear, lowering: Any, given: Any, x: Any, zero_point: Any) -> jax.Array:
    return lowerings.accumulate(operation, given, x, zero_point, lowering)


@pytest.mark.parametrize("case", operations.CASES, ids=lambda case: case.id)
@hypothesis.settings(max_examples=5)
@hypothesis.given(
    seed=st.integers(0, 2**16), bits=st.sampled_from([(8, 8), (4, 8), (2, 2), (12, 9)])
)
def test_accumulators_equal_int64(case: operations.Case, seed: int, bits: tuple[int, int]):
    operation = case.operation
    layer = random_layer(operation, *bits, seed)
    assert layer.inputs is not None
    stored = lowerings.signed(layer.inputs)
    shape = case.x_shape
    codes = np.random.default_rng(seed).integers(stored.qmin, stored.qmax, shape, endpoint=True)
    zero_point = int(stored.zero_point)
    expected = in_int64(operation, layer, codes - zero_point)
    x = jnp.asarray(codes, stored.dtype)
    found = [method.lower(operation, layer) for method in LOWERINGS.values()]
    are_bytes = max(bits) <= 8
    expected_of = [True, True, are_bytes, are_bytes and has_pairs(operation), True]
    assert [lowering is not None for lowering in found] == expected_of
    for lowering in filter(None, found):
        folded = lowerings.folded_bias(layer, lowering.method)
        given = lowerings.operands(operation, layer, folded, lowering)
        acc = accumulated(operation, lowering, given, x, stored.zero_point)
        np.testing.assert_array_equal(operations.by_channel(operation, acc), expected)
    assert np.abs(expected).max() <= lowerings.largest(layer)


def test_the_worst_case_is_reached():
    case = next(case for case in operations.CASES if case.id == "dot_rhs")
    layer = random_layer(case.operation, 8, 8, 0)
    assert layer.inputs is not None
    kernel = np.asarray(layer.kernel, np.int64)[0]
    low, high = (np.asarray(bound)[0] for bound in lowerings.worst_case(layer))
    least, most = -int(layer.inputs.zero_point), 255 - int(layer.inputs.zero_point)
    greatest = [np.where(kernel[:, m] > 0, most, least) @ kernel[:, m] for m in range(len(high))]
    smallest = [np.where(kernel[:, m] > 0, least, most) @ kernel[:, m] for m in range(len(low))]
    np.testing.assert_array_equal(greatest, high)
    np.testing.assert_array_equal(smallest, low)


# ---- Networks


CASES = {case.id: case for case in models.CASES}
each_case = pytest.mark.parametrize("id", CASES)


@functools.cache
def quantized(id: str) -> qjax.Quantized:
    case = CASES[id]
    return qjax.quantize(case.apply_fn, case.params, case.x, qjax.Recipe().naive())


def codes_differ(q: qjax.Quantized, x: Any, arithmetic: Any) -> tuple[float, int]:
    """The share of output codes that differ from fake quantization's, and by how much at most."""
    fake = q.apply_fn.codes(q.params, x)
    found = qjax.integer(q, arithmetic=arithmetic).codes(q.params, x)
    assert fake.keys() == found.keys() and fake
    off = [np.abs(np.asarray(found[k], np.int64) - np.asarray(fake[k], np.int64)) for k in fake]
    differing = sum(int(np.sum(d > 0)) for d in off)
    return differing / sum(d.size for d in off), max(int(d.max()) for d in off)


@pytest.mark.usefixtures("optimized")
@each_case
def test_the_codes_are_those_of_fake_quantization(id: str):
    share, most = codes_differ(quantized(id), CASES[id].x, "float")
    assert share <= 1e-4 and most <= 1


@pytest.mark.usefixtures("optimized")
def test_the_codes_of_residual_sums_are_the_same_in_every_program():
    """Many codes, to meet values that two roundings of a sum or a quotient would tell apart."""
    keys = jax.random.split(jax.random.key(0), 7)
    params = [jax.random.normal(key, (32, 32)) / 4 for key in keys[:6]]
    x = jax.random.normal(keys[6], (20_000, 32))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x @ params[0])
        for first, second in zip(params[1::2], params[2::2], strict=False):
            x = jax.nn.relu(x + jax.nn.relu(x @ first) @ second)
        return x @ params[5]

    q = qjax.quantize(apply_fn, params, x, qjax.Recipe(sweeps=0, reconstructions=0))
    assert codes_differ(q, x, "float") == (0.0, 0)


@pytest.mark.parametrize("kind", ["fake", "integer"])
def test_no_quotient_is_left_to_the_compiler(kind: str, optimized: dict[str, Any]):
    """It computes some as products with the reciprocal, which round differently."""
    q, x = quantized("linen_resnet"), CASES["linen_resnet"].x
    codes = q.apply_fn.codes if kind == "fake" else qjax.integer(q).codes
    text = jax.jit(codes).lower(q.params, x).compile(optimized).as_text()
    assert text is not None
    quotients = re.findall(r"= f32\[([\d,]*)\]\S* divide\(", text)
    assert quotients and set(quotients) <= {"", "1"}, "only reciprocals of scales"


@pytest.mark.parametrize("id", ["linen_resnet", "linen_mobilenet", "plain_nchw"])
def test_fixed_point_is_as_good(id: str):
    share, most = codes_differ(quantized(id), CASES[id].x, "fixed_point")
    assert share <= 5e-3 and most <= 2


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_lowering_does_not_change_the_result(lowering: Any):
    q, x = quantized("linen_resnet"), CASES["linen_resnet"].x
    y = qjax.integer(q)(q.params, x)
    run = qjax.integer(q, lowering=where_it_can(lowering, q, x))
    np.testing.assert_array_equal(run(q.params, x), y)


def where_it_can(lowering: str, q: qjax.Quantized, x: Any) -> dict[str, str]:
    """A lowering, by name of the layers that it computes."""
    method, layers = LOWERINGS[lowering], q.params["layers"]
    found = {
        site.layer.name: lowering
        for site in q.apply_fn.network(x).first_sites
        if method.lower(site.layer.operation, layers[site.layer.name]) is not None
    }
    assert len(found) > 1
    return found


@pytest.mark.parametrize("arithmetic", ["shift", "floor", "divide"])
def test_cruder_arithmetics_lose_more(arithmetic: Any):
    q, x = quantized("linen_resnet"), CASES["linen_resnet"].x
    exact, _ = codes_differ(q, x, "fixed_point")
    crude, _ = codes_differ(q, x, arithmetic)
    assert crude > exact


def test_accumulators_are_integers_below_the_worst_case():
    q, x = quantized("linen_resnet"), CASES["linen_resnet"].x
    found = qjax.integer(q).accumulators(q.params, x)
    assert set(found) == set(q.params["layers"])
    for name, acc in found.items():
        assert acc.dtype == jnp.int32
        assert np.abs(np.asarray(acc, np.int64)).max() <= lowerings.largest(
            q.params["layers"][name]
        )


def test_unsigned_codes_of_weights_meet_signed_ones_of_inputs():
    case = CASES["plain_mlp"]
    weights = qjax.QuantSpec(8, symmetric=False, granularity="per_channel")
    q = qjax.quantize(case.apply_fn, case.params, case.x, qjax.recipe(8, weights=weights).naive())
    fake = q.apply_fn.codes(q.params, case.x)
    for lowering in ("int8", "dot", "float32"):
        found = qjax.integer(q, lowering=lowering).codes(q.params, case.x)
        for name, codes in fake.items():
            np.testing.assert_array_equal(found[name], codes)
    with pytest.raises(
        ValueError, match="layer '0': it takes a CPU, .* signed ones of the weights"
    ):
        qjax.integer(q, lowering="uint8")(q.params, case.x)


@pytest.mark.parametrize("lowering", ["dot", "uint8", "pairs"])
@pytest.mark.parametrize("batch", [1, 6, 7])
def test_chunks_of_a_batch_give_what_the_batch_gives(
    lowering: str, batch: int, monkeypatch: pytest.MonkeyPatch
):
    q, x = quantized("linen_resnet"), CASES["linen_resnet"].x[:1]
    x = jnp.concatenate([x + i for i in range(batch)])
    expected = q.apply_fn.codes(q.params, x)
    monkeypatch.setattr(chunks, "_BYTES", 2**14)
    run = qjax.integer(q, lowering=where_it_can(lowering, q, x))
    text = jax.jit(run.codes).lower(q.params, x).as_text()
    assert ("while" in text) == (batch > 1)
    chex.assert_trees_all_equal(jax.jit(run.codes)(q.params, x), expected, strict=True)


@pytest.mark.parametrize("lowering", ["uint8", "pairs"])
def test_a_batch_of_any_size(lowering: str):
    q, x = quantized("linen_resnet"), CASES["linen_resnet"].x
    run = qjax.integer(q, lowering=where_it_can(lowering, q, x))
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(lambda x: run(q.params, x)))(shape)
    for n in (1, 3):
        np.testing.assert_array_equal(exported.call(x[:n]), run(q.params, x[:n]))


def test_layers_in_float_stay_in_float():
    case = CASES["linen_resnet"]
    recipe = qjax.Recipe(overrides={"@first": {"weights": None}}).naive()
    q = qjax.quantize(case.apply_fn, case.params, case.x, recipe)
    function = qjax.integer(q)
    assert q.report[0].name not in function.lowerings(case.x)
    share, most = codes_differ(q, case.x, "float")
    assert share <= 1e-4 and most <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"arithmetic": 3},
            "`arithmetic` must be one of float, fixed_point, .*; got 3",
        ),
        (
            {"arithmetic": "double"},
            "`arithmetic` must be one of float, fixed_point, .*; got 'double'",
        ),
        (
            {"lowering": "fpga"},
            "`lowering` must be one of int8, dot, uint8, pairs, float32; got 'fpga'",
        ),
        ({"lowering": {"nowhere": "int8"}}, "`lowering` names 'nowhere', which is no layer"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        qjax.integer(quantized("plain_mlp"), **options)


def test_methods_are_given_by_name_or_as_they_are():
    q, x = quantized("plain_mlp"), CASES["plain_mlp"].x
    named = qjax.integer(q, arithmetic="floor", lowering="dot")
    own = ARITHMETICS["floor"]._replace(name="own")
    given = qjax.integer(q, arithmetic=own, lowering=dict.fromkeys(q.params["layers"], DOT))
    assert given.lowerings(x) == named.lowerings(x) == dict.fromkeys(named.layers, Lowering(DOT))
    np.testing.assert_array_equal(given(q.params, x), named(q.params, x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arithmetic": "fixed_point", "lowering": "dot"},
        {"accumulator": qjax.Accumulator(12, "saturate", "term")},
    ],
    ids=["default", "fixed_point", "narrow"],
)
def test_equal_quantizations_share_their_programs(
    options: dict[str, Any], programs_compiled: list[str]
):
    case = CASES["plain_mlp"]

    def run() -> None:
        recipe = qjax.recipe(8, outputs=None).naive()
        q = qjax.quantize(case.apply_fn, case.params, case.x, recipe)
        function = qjax.integer(q, **options)
        for evaluate in (function, function.codes, function.accumulators):
            evaluate(q.params, case.x)

    run()
    first = len(programs_compiled)
    run()
    assert len(programs_compiled) == first > 0


def test_other_methods_have_other_programs():
    q, x = quantized("plain_mlp"), CASES["plain_mlp"].x
    runs = [qjax.integer(q, arithmetic=name) for name in ARITHMETICS]
    runs.append(qjax.integer(q, accumulator=qjax.Accumulator(6)))
    results = {np.asarray(run(q.params, x)).tobytes() for run in runs}
    assert len(results) > 4


def test_nothing_of_a_trace_is_left_behind():
    q, x = quantized("plain_mlp"), CASES["plain_mlp"].x
    function = qjax.integer(q)
    traced = jax.jit(lambda x: function(q.params, x))(x)
    np.testing.assert_array_equal(function(q.params, x), traced)
    np.testing.assert_array_equal(jax.jit(lambda x: function(q.params, x))(x[:1]), traced[:1])


@pytest.mark.parametrize(
    "helper",
    [lambda x: jnp.swapaxes(x, 1, 2), lambda x: x.astype(jnp.int32).astype(jnp.float32)],
    ids=["transposed", "truncated"],
)
def test_what_a_jitted_function_does_to_the_values_is_done(helper: Any):
    keys = jax.random.split(jax.random.key(0), 3)
    params = [jax.random.normal(key, (6, 6)) for key in keys[:2]]
    x = 3 * jax.random.normal(keys[2], (8, 6, 6))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.jit(helper)(x @ params[0]) @ params[1]

    q = qjax.quantize(apply_fn, params, x, qjax.recipe(8).naive())
    share, most = codes_differ(q, x, "float")
    assert share <= 1e-2 and most <= 1


def test_it_can_be_jitted_and_exported():
    q, x = quantized("plain_nchw"), CASES["plain_nchw"].x
    function = qjax.integer(q, arithmetic="fixed_point")
    y = function(q.params, x)
    np.testing.assert_array_equal(jax.jit(function)(q.params, x), y)
    exported = jax.export.export(jax.jit(lambda x: function(q.params, x)))(x)
    np.testing.assert_array_equal(exported.call(x), y)
