"""The whole transformation: on every model of the table, under every transformation of JAX."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, PartitionSpec

import qjax
from qjax import QParams, Quantized, QuantSpec, Recipe
from qjax.recipe import ACTIVATIONS

EMPTY = Recipe(weights=None, inputs=None, outputs=None)
CHEAP = Recipe().naive()  # compiles fastest
LEAST_DB = 32.0  # at 8 bits the models of the table reach 34 to 49
# Compiling the default recipe takes its time. Between them these have dense, full, grouped and
# depthwise kernels and every activation; the other models are quantized with the cheap one.
FITTED = ("haiku_cnn", "activations", "grouped_dense")
CASES: dict[str, Any] = {case.id: case for case in models.CASES}
each_case = pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.id)


@functools.cache
def expected(id: str) -> Any:
    """What a model of the table computes in float."""
    case = CASES[id]
    return jax.jit(case.apply_fn)(case.params, case.x)


@functools.cache
def quantized(id: str) -> Quantized:
    """A model of the table at 8 bits."""
    case = CASES[id]
    recipe = None if id in FITTED else CHEAP
    return qjax.quantize(case.apply_fn, case.params, case.x, recipe)


def sqnrs_db(reference: Any, approximation: Any) -> list[float]:
    """The signal to noise ratio of every output."""
    chex.assert_trees_all_equal_shapes_and_dtypes(reference, approximation)
    pairs = zip(jax.tree.leaves(reference), jax.tree.leaves(approximation), strict=True)
    return [
        float(qjax.sqnr_db(*(jnp.asarray(leaf, jnp.float32) for leaf in pair))) for pair in pairs
    ]


def check_laws(q: Quantized) -> None:
    """What holds of every quantized network, whatever the recipe."""
    assert all(
        np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(q.params)
    )
    assert {record.name for record in q.report} == set(q.params["layers"])
    for record in q.report:
        layer = q.params["layers"][record.name]
        numbers = [value for value in dataclasses.asdict(record).values() if value is not None]
        assert not np.any(np.isnan([value for value in numbers if isinstance(value, float)]))
        groups, _, channels = layer.kernel.shape
        chex.assert_shape(layer.bias, (groups * channels,))
        assert layer.bias.dtype == (jnp.int32 if layer.has_integer_accumulator else jnp.float32)
        for qparams in (layer.weights, layer.inputs, layer.outputs, layer.activated):
            if qparams is not None:
                assert np.all(np.asarray(qparams.scale) > 0)
                zero_point = np.asarray(qparams.zero_point)
                assert np.all((qparams.qmin <= zero_point) & (zero_point <= qparams.qmax))
        for qparams in (layer.inputs, layer.outputs, layer.activated):
            if qparams is not None:
                chex.assert_shape((qparams.scale, qparams.zero_point), ())
        if layer.weights is None:
            assert layer.kernel.dtype == jnp.float32
        else:
            assert layer.kernel.dtype == layer.weights.dtype
            codes = np.asarray(layer.kernel)
            qmin, qmax = int(layer.weights.qmin), int(layer.weights.qmax)
            assert qmin <= codes.min() and codes.max() <= qmax


# ---- Every model of the table


@each_case
def test_8_bits_are_close_to_float(case: models.Case):
    q = quantized(case.id)
    check_laws(q)
    found = sqnrs_db(expected(case.id), q.apply_fn(q.params, case.x))
    assert min(found) > LEAST_DB
    assert [record.name for record in q.report] == [layer.name for layer in case.expected]
    for record in q.report:
        assert (record.weight_bits, record.input_bits, record.output_bits) == (8, 8, 8)
        assert record.output_sqnr_db > LEAST_DB
    if case.id in FITTED and len(found) == 1:  # fitted one after the other, to the last
        assert q.report[-1].output_sqnr_db == pytest.approx(found[0], abs=0.01)


@each_case
def test_an_empty_recipe_is_the_float_network(case: models.Case):
    q = qjax.quantize(case.apply_fn, case.params, case.x, EMPTY)

    def check(reference: jax.Array, folded: jax.Array) -> None:
        largest = np.abs(reference).max()
        np.testing.assert_allclose(folded, reference, rtol=1e-4, atol=1e-4 * largest)

    jax.tree.map(check, expected(case.id), q.apply_fn(q.params, case.x))
    check_laws(q)


def test_only_what_is_still_read_of_the_params_is_kept():
    assert quantized("linen_cnn").params["rest"] == {}, "biases and batch norms are folded"
    rest = quantized("linen_transformer").params["rest"]
    norms = {f"params/LayerNorm_{i}/{leaf}" for i in range(2) for leaf in ("scale", "bias")}
    assert set(rest) == norms


@pytest.mark.parametrize("id", ["linen_resnet", "equinox_cnn", "plain_nchw"])
def test_a_result_does_not_depend_on_the_other_examples(id: str):
    q, x = quantized(id), CASES[id].x
    y = q.apply_fn(q.params, x)
    chex.assert_trees_all_close(q.apply_fn(q.params, x[:1]), y[:1], rtol=1e-5, atol=1e-5)


def test_the_range_of_an_output_sees_the_activation_after_it():
    case, by_name = CASES["activations"], {r.name: r for r in quantized("activations").report}
    for name, (_, activation) in models.ACTIVATIONS.items():
        scale, z = by_name[name].output_scale, case.x @ case.params[name]
        assert scale is not None
        if activation in ("relu", "relu6"):
            assert by_name[name].output_zero_point == 0, "the negative half costs nothing"
            assert scale < 0.8 * float(z.max() - z.min()) / 255
        if activation == "relu6":
            assert scale <= 6 / 255 * (1 + 1e-6)
    assert by_name["identity"].output_zero_point != 0


def test_codes_that_are_still_on_the_grid_keep_it():
    layers = quantized("linen_cnn").params["layers"]
    for before, after in (("Conv_0", "Conv_1"), ("Conv_1", "Conv_2"), ("Dense_0", "Dense_1")):
        chex.assert_trees_all_equal(layers[before].outputs, layers[after].inputs)
    assert layers["Conv_2"].outputs.scale != layers["Dense_0"].inputs.scale, "average pooling"


# ---- Transformations of JAX


def network() -> tuple[Quantized, jax.Array, Any]:
    q, x = quantized("linen_cnn"), CASES["linen_cnn"].x
    return q, x, np.asarray(q.apply_fn(q.params, x))


def test_under_jit():
    q, x, y = network()
    chex.assert_trees_all_close(jax.jit(q.apply_fn)(q.params, x), y, rtol=1e-5, atol=1e-5)


def test_under_vmap():
    q, x, y = network()
    one_by_one = jax.vmap(lambda image: q.apply_fn(q.params, image[None])[0])(x)
    np.testing.assert_allclose(one_by_one, y, rtol=1e-5, atol=1e-5)


def test_under_grad():
    q, x, _ = network()
    case = CASES["linen_cnn"]
    direction = models.normal(4, 10)

    def gradient(function: Callable[[Any, Any], jax.Array], params: Any) -> np.ndarray:
        loss = jax.jit(jax.grad(lambda x: jnp.sum(function(params, x) * direction)))
        return np.asarray(loss(x)).ravel()

    g, g_hat = gradient(case.apply_fn, case.params), gradient(q.apply_fn, q.params)
    cosine = g @ g_hat / np.linalg.norm(g) / np.linalg.norm(g_hat)
    assert cosine > 0.95


def test_under_export():
    q, x, y = network()
    exported = jax.export.export(jax.jit(lambda x: q.apply_fn(q.params, x)))(x)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(restored.call(x), y, rtol=1e-5, atol=1e-5)


def test_export_with_a_symbolic_number_of_examples():
    q, x, y = network()
    [size] = jax.export.symbolic_shape("size")
    shape = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(q.apply_fn))(q.params, shape)
    np.testing.assert_allclose(exported.call(q.params, x), y, rtol=1e-5, atol=1e-5)


def test_sharded_inputs(mesh: jax.sharding.Mesh):
    q, x, y = network()
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    y_sharded = q.apply_fn(q.params, sharded)
    assert len(y_sharded.sharding.device_set) == 4
    np.testing.assert_allclose(y_sharded, y, rtol=1e-5, atol=1e-5)


# ---- A small network, many recipes


RNG = np.random.default_rng(0)
PARAMS = {  # all of one shape, so that a recipe compiles for one layer
    "first": jnp.asarray(RNG.normal(size=(8, 8)) / 2, jnp.float32),
    "middle": jnp.asarray(RNG.normal(size=(8, 8)) / 2, jnp.float32),
    "last": jnp.asarray(RNG.normal(size=(8, 8)) / 2, jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=8) / 4, jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["first"] + params["bias"][None])
    return jax.nn.relu(x @ params["middle"]) @ params["last"]


def mlp_db(q: Quantized) -> float:
    check_laws(q)
    [result] = sqnrs_db(mlp(PARAMS, X), q.apply_fn(q.params, X))
    return result


def test_bits_is_short_for_a_recipe():
    q = qjax.quantize(mlp, PARAMS, X, bits=8)
    other = qjax.quantize(mlp, PARAMS, X, qjax.recipe(8))
    chex.assert_trees_all_equal(q.params, other.params, strict=True)
    assert q.report == other.report


def cheap(**fields: Any) -> Recipe:
    return dataclasses.replace(CHEAP, **fields)


def weights_only(weights: QuantSpec, **fields: Any) -> Recipe:
    return cheap(weights=weights, inputs=None, outputs=None, **fields)


def test_more_bits_are_closer():
    floats = {"range_method": "absmax", "rounding": "nearest", "sweeps": 0, "sequential": False}
    recipes = [qjax.recipe(bits, bias_correction=False, **floats) for bits in (3, 5, 8, 12)]
    found = [mlp_db(qjax.quantize(mlp, PARAMS, X, recipe)) for recipe in recipes]
    assert all(later - earlier > 6 for earlier, later in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("container", [list, iter])
def test_how_the_images_are_handed_over_does_not_matter(container: Callable[[Any], Any]):
    images = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    q = qjax.quantize(mlp, PARAMS, images)
    parts = np.split(images, [1, 120, 130])  # uneven, and across qjax's own batches
    other = qjax.quantize(mlp, PARAMS, container(parts))
    chex.assert_trees_all_equal(other.params, q.params, strict=True)
    assert other.report == q.report


def test_mappings_of_inputs_may_come_in_batches_too():
    case = CASES["two_inputs"]
    halves = [
        jax.tree.map(lambda leaf, part=part: leaf[part], case.x)
        for part in np.split(np.arange(4), 2)
    ]
    q = qjax.quantize(case.apply_fn, case.params, halves, CHEAP)
    chex.assert_trees_all_equal(q.params, quantized("two_inputs").params, strict=True)


def test_calibration_on_a_mesh(mesh: jax.sharding.Mesh):
    q = qjax.quantize(mlp, PARAMS, X)
    on_mesh = qjax.quantize(mlp, PARAMS, X, mesh=mesh)
    check_laws(on_mesh)
    y, y_on_mesh = (np.asarray(r.apply_fn(r.params, X)) for r in (q, on_mesh))
    [noise_db] = sqnrs_db(y, y_on_mesh)
    assert noise_db > 60
    scales, scales_on_mesh = (
        [leaf for leaf in jax.tree.leaves(r.params) if leaf.dtype == jnp.float32]
        for r in (q, on_mesh)
    )
    chex.assert_trees_all_close(scales_on_mesh, scales, rtol=1e-4)


def test_the_users_function_is_traced_once_per_shape():
    def copy(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x)

    counted: Any = chex.assert_max_traces(copy, n=4)
    for _ in range(2):
        q = qjax.quantize(counted, PARAMS, X, CHEAP)  # once, and once more to see that it is pure
    for _ in range(3):
        q.apply_fn(q.params, X)  # once
        q.apply_fn(q.params, X[:2])  # once


@pytest.mark.parametrize("position", ["pre_activation", "post_activation", "both"])
def test_output_position(position: str):
    recipe = cheap(output_position=position)
    q = qjax.quantize(mlp, PARAMS, X, recipe)
    assert mlp_db(q) > LEAST_DB
    layers = q.params["layers"]
    for name, layer in layers.items():
        has_activation = name != "last"
        assert (layer.outputs is not None) == (position != "post_activation")
        is_after = position == "post_activation" or (position == "both" and has_activation)
        assert (layer.activated is not None) == is_after
    if position == "post_activation":
        assert layers["first"].activated.zero_point == 0
        chex.assert_trees_all_equal(layers["first"].activated, layers["middle"].inputs)


def representable(x: jax.Array, qparams: QParams) -> bool:
    codes = np.asarray(x) / np.asarray(qparams.scale)
    return bool(np.all(np.abs(codes - np.round(codes)) < 1e-3))


@pytest.mark.parametrize("position", ["pre_activation", "post_activation"])
def test_the_result_is_on_the_grid_of_the_last_output(position: str):
    q = qjax.quantize(mlp, PARAMS, X, cheap(output_position=position))
    last = q.params["layers"]["last"]
    assert representable(q.apply_fn(q.params, X), last.outputs or last.activated)
    assert not representable(mlp(PARAMS, X), last.outputs or last.activated)


@pytest.mark.parametrize(
    ("spec", "inputs", "shape"),
    [
        (QuantSpec(granularity="per_tensor"), ACTIVATIONS, (1, 1, 1)),
        (QuantSpec(), ACTIVATIONS, (1, 1, 8)),
        (QuantSpec(), None, (1, 1, 8)),
        (QuantSpec(symmetric=False), ACTIVATIONS, (1, 1, 8)),
        (QuantSpec(symmetric=False), None, (1, 1, 8)),
        (QuantSpec(granularity="per_group", group_size=3), ACTIVATIONS, (1, 3, 8)),
        (QuantSpec(8, False, "per_group", group_size=3), None, (1, 3, 8)),
    ],
)
def test_formats_of_weights(spec: QuantSpec, inputs: QuantSpec | None, shape: tuple[int, ...]):
    q = qjax.quantize(mlp, PARAMS, X, cheap(weights=spec, inputs=inputs))
    assert mlp_db(q) > LEAST_DB
    weights = q.params["layers"]["middle"].weights
    chex.assert_shape(weights.scale, shape)
    assert bool(np.any(weights.zero_point)) != spec.symmetric


def test_finer_granularity_is_closer():
    specs = [
        QuantSpec(3, granularity="per_tensor"),
        QuantSpec(3),
        QuantSpec(3, granularity="per_group", group_size=2),
    ]
    found = [mlp_db(qjax.quantize(mlp, PARAMS, X, weights_only(spec))) for spec in specs]
    assert found == sorted(found)


def test_overrides():
    recipe = cheap(
        overrides={"*": {"bits": 6}, "@first": {"weight_bits": 8}, "m*": {"inputs": None}}
        | {"@last": {"bits": 4, "output_bits": None}}
    )
    q = qjax.quantize(mlp, PARAMS, X, recipe)
    check_laws(q)
    widths = {r.name: (r.weight_bits, r.input_bits, r.output_bits) for r in q.report}
    assert widths == {"first": (8, 6, 6), "middle": (6, None, 6), "last": (4, 4, None)}
    layers = q.params["layers"]
    assert [layer.kernel.dtype for layer in layers.values()] == [jnp.int8] * 3
    assert int(np.abs(layers["last"].kernel).max()) == 7
    assert layers["middle"].inputs is None and layers["last"].outputs is None


def test_an_override_that_matches_no_layer_is_refused():
    recipe = cheap(overrides={"conv*": {"bits": 4}})
    with pytest.raises(
        ValueError, match=r"'conv\*' matches no layer; the layers are first, middle"
    ):
        qjax.quantize(mlp, PARAMS, X, recipe)


@pytest.mark.parametrize("position", ["pre_activation", "post_activation"])
def test_logits_keep_the_probabilities(position: Any):
    outputs = dataclasses.replace(ACTIVATIONS, bits=3)
    recipe = cheap(outputs=outputs, output_position=position, range_method="output_mse")
    found = [
        qjax.quantize(mlp, PARAMS, X, dataclasses.replace(recipe, logits=logits))
        for logits in (False, True)
    ]
    roots = jnp.sqrt(jax.nn.softmax(mlp(PARAMS, X)))
    by_values, by_probabilities = (
        float(jnp.sum(jnp.square(jnp.sqrt(jax.nn.softmax(q.apply_fn(q.params, X))) - roots)))
        for q in found
    )
    assert by_probabilities < by_values
    before, after = (
        {name: layer for name, layer in q.params["layers"].items() if name != "last"} for q in found
    )
    chex.assert_trees_all_equal(before, after)


def test_logits_that_no_layer_makes_are_refused():
    with pytest.raises(ValueError, match=r"`logits` needs a layer whose .* logits=False"):
        qjax.quantize(lambda params, x: mlp(params, x).sum(), PARAMS, X, cheap(logits=True))


def test_bias_correction_removes_the_mean_error():
    errors = []
    for corrects in (False, True):
        recipe = weights_only(QuantSpec(3), sequential=True, bias_correction=corrects)
        q = qjax.quantize(mlp, PARAMS, X, recipe)
        errors.append(np.abs(np.mean(q.apply_fn(q.params, X) - mlp(PARAMS, X), axis=0)).max())
    assert errors[0] > 1e-2 and errors[1] < 1e-5


def test_sequential_fitting_knows_the_error_of_earlier_layers():
    together, apart = (
        qjax.quantize(
            mlp, PARAMS, X, weights_only(QuantSpec(3), sequential=sequential, reconstructions=1)
        )
        for sequential in (True, False)
    )
    first = [q.params["layers"]["first"] for q in (together, apart)]
    chex.assert_trees_all_close(*first, rtol=1e-5)
    assert mlp_db(together) > mlp_db(apart) + 1


def residual(shortcut_comes_late: bool, params: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["first"] + params["bias"][None])
    if shortcut_comes_late:
        branch = hidden @ params["middle"]
        shortcut = jnp.flip(hidden, axis=1)
    else:
        shortcut = jnp.flip(hidden, axis=1)
        branch = hidden @ params["middle"]
    return jax.nn.relu(shortcut + branch) @ params["last"]


def test_a_shortcut_is_known_whenever_it_is_computed():
    recipe = dataclasses.replace(CHEAP, range_method="output_mse")
    early, late = (
        qjax.quantize(functools.partial(residual, comes_late), PARAMS, X, recipe)
        for comes_late in (False, True)
    )
    chex.assert_trees_all_equal(early.params, late.params)


@pytest.mark.parametrize("recipe", [CHEAP, Recipe()], ids=["cheap", "default"])
def test_dead_channels_and_dead_inputs_are_harmless(recipe: Recipe):
    params = PARAMS | {
        "first": PARAMS["first"].at[:, 3].set(0.0),
        "bias": PARAMS["bias"].at[3].set(0.0),
        "middle": jnp.zeros_like(PARAMS["middle"]),
    }
    q = qjax.quantize(mlp, params, X.at[:, 2].set(0.0), recipe)
    check_laws(q)
    assert not np.any(q.apply_fn(q.params, X))
    layers = q.params["layers"]
    assert layers["first"].weights.scale[0, 0, 3] == 1.0
    assert not np.any(layers["first"].kernel[:, :, 3])
    np.testing.assert_array_equal(layers["middle"].weights.scale, np.ones((1, 1, 8)))


@pytest.mark.parametrize("recipe", [CHEAP, Recipe()], ids=["cheap", "default"])
def test_images_of_zeros_are_harmless(recipe: Recipe):
    q = qjax.quantize(mlp, PARAMS | {"bias": jnp.zeros(8)}, jnp.zeros_like(X), recipe)
    check_laws(q)
    assert np.all(np.isfinite(q.apply_fn(q.params, X)))


def test_bfloat16():
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (PARAMS, X))
    q = qjax.quantize(mlp, params, x)
    check_laws(q)
    y = q.apply_fn(q.params, x)
    assert y.dtype == jnp.bfloat16
    reference = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    [found] = sqnrs_db(mlp(*reference), y.astype(jnp.float32))
    assert found > LEAST_DB


def test_numpy_double_precision_images():
    q = qjax.quantize(mlp, PARAMS, np.asarray(X, np.float64), CHEAP)
    other = qjax.quantize(mlp, PARAMS, X, CHEAP)
    chex.assert_trees_all_equal(q.params, other.params, strict=True)


def test_integer_inputs():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return params["embedding"][x].mean(1) @ params["w"]

    params = {"embedding": PARAMS["middle"], "w": PARAMS["last"]}
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 8, (32, 7)))
    q = qjax.quantize(apply_fn, params, tokens, CHEAP)
    check_laws(q)
    assert list(q.params["rest"]) == ["embedding"]
    [found] = sqnrs_db(apply_fn(params, tokens), q.apply_fn(q.params, tokens))
    assert found > LEAST_DB


def test_a_shared_kernel_is_fitted_at_each_use():
    q = quantized("shared_kernel")
    assert list(q.params["layers"]) == ["w", "w@1", "w@2"]
    recipe = cheap(overrides={"w@1": {"weight_bits": 4}})
    case = CASES["shared_kernel"]
    q = qjax.quantize(case.apply_fn, case.params, case.x, recipe)
    check_laws(q)
    assert [record.weight_bits for record in q.report] == [8, 4, 8]


def test_progress_is_reported():
    calls = []
    qjax.quantize(mlp, PARAMS, X, CHEAP, progress=lambda *call: calls.append(call))
    assert calls == [("first", 0, 3), ("middle", 1, 3), ("last", 2, 3), ("", 3, 3)]


def test_a_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]):
    qjax.quantize(mlp, PARAMS, X, CHEAP, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "quantizing" in err and "3/3" in err


# ---- What a user gets told


def test_other_layers_at_another_shape_are_refused():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x @ params["last"] if len(x) > 16 else x)

    q = qjax.quantize(apply_fn, PARAMS, X, CHEAP)
    with pytest.raises(ValueError, match=r"`x` leads `apply_fn` through other layers .* quantize"):
        q.apply_fn(q.params, X[:16])


NAN = jnp.full((4, 8), jnp.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": CHEAP, "bits": 8}, "`recipe` and `bits` were both given; give one"),
        ({"bits": 0}, "`bits` must be an integer from 1 to 16; got 0"),
        ({"bits": 17}, "`bits` must be an integer from 1 to 16; got 17"),
        ({"batches": []}, "`batches` is empty; pass at least one"),
        ({"batches": iter(())}, "`batches` is empty; pass at least one"),
        ({"batches": X[:0]}, "`batches` holds no image; pass at least one"),
        ({"batches": [X[:0], X[:0]]}, "`batches` holds no image"),
        ({"batches": [X, NAN]}, "`batches` must be finite; found NaN or infinity"),
        ({"batches": {"image": NAN}}, "`batches` must be finite; found NaN .* at 'image'"),
        ({"batches": X.at[3, 2].set(jnp.inf)}, "`batches` must be finite"),
        (
            {"batches": {"image": X, "vector": X[:3]}},
            r"every array in `batches` must have the same leading axis .* got \[3, 32\]",
        ),
        (
            {"params": PARAMS | {"last": PARAMS["last"].at[0, 0].set(jnp.nan)}},
            "`params` must be finite; found NaN or infinity at 'last'",
        ),
        ({"params": PARAMS | {"bias": jnp.full(8, -jnp.inf)}}, "`params` .* at 'bias'"),
        ({"apply_fn": lambda params, x: jnp.tanh(x)}, "`apply_fn` has no layer to quantize"),
        ({"apply_fn": lambda params, x: params["first"]}, "`apply_fn` has no layer to quantize"),
        ({"apply_fn": lambda params, x: x @ X.T}, "is closed over by `apply_fn`"),
        (
            {"apply_fn": lambda params, x: mlp(params, x) * np.random.default_rng().random()},
            "`apply_fn` is another function every time it is traced",
        ),
    ],
)
def test_what_a_user_gets_told(change: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"apply_fn": mlp, "params": PARAMS, "batches": X} | change
    with pytest.raises(ValueError, match=message):
        qjax.quantize(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": 8}, r"`recipe` must be a qjax.Recipe; got int"),
        ({"apply_fn": PARAMS, "params": mlp}, "`apply_fn` must be a function .* got dict"),
        ({"mesh": 8}, "`mesh` must be a jax.sharding.Mesh, .* got 8"),
        ({"params": PARAMS | {"scale": 2.0}}, "`params` must hold arrays; found float at 'scale'"),
        ({"batches": "images"}, "`batches` must be arrays of images; got 'images'"),
        ({"batches": [(X, 1)]}, r"got a tuple of 2. Of \(image, label\) pairs pass the images"),
        ({"batches": X.tolist()}, "every batch must be an array of images, .* got list"),
    ],
)
def test_an_argument_of_another_kind_is_refused(change: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"apply_fn": mlp, "params": PARAMS, "batches": X} | change
    with pytest.raises(TypeError, match=message):
        qjax.quantize(**arguments)


@pytest.mark.parametrize("pick", [list, lambda images: images[0]], ids=["a list of them", "one"])
def test_single_images_are_refused(pick: Callable[[Any], Any]):
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], 6) @ params["w"]

    params, images = {"w": jnp.ones((6, 2))}, np.ones((5, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"got images of shape \(2, 3\) .* Stack them: np.stack"):
        qjax.quantize(apply_fn, params, pick(images), CHEAP)


def test_images_with_labels_are_refused():
    with pytest.raises(ValueError, match=r"images of the same shape; got .* If `batches` is"):
        qjax.quantize(mlp, PARAMS, (X, np.zeros(len(X))), CHEAP)


def test_a_width_may_be_numpys():
    recipe = qjax.recipe(np.int64(4))  # pyright: ignore[reportArgumentType]
    assert recipe == qjax.recipe(4) and type(recipe.weights.bits) is int


def test_ranges_per_example_need_an_axis_of_examples():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, 4) @ params["tokens"]
        return tokens.reshape(x.shape[0], -1) @ params["head"]

    params = {"tokens": jnp.ones((4, 3)), "head": jnp.ones((15, 2))}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 4)), jnp.float32)
    recipe = qjax.recipe(8, activation_ranges="dynamic", activation_granularity="per_example")
    message = "layer 'tokens' cannot have granularity per_example: its examples have no axis"
    with pytest.raises(ValueError, match=message):
        qjax.quantize(apply_fn, params, x, recipe.naive())
    tensor = qjax.QuantSpec(8, False, "per_tensor", ranges="dynamic")
    mixed = dataclasses.replace(recipe.naive(), overrides={"tokens": {"inputs": tensor}})
    q = qjax.quantize(apply_fn, params, x, mixed)
    layers = q.params["layers"]
    assert (layers["tokens"].inputs.axis, layers["head"].inputs.axis) == (None, 0)


def test_with_ranges_at_run_time_layers_are_fitted_on_what_they_will_meet():
    """The refits and GPTQ see the input rounded at the ranges of its batch."""
    x, params = small.images(), small.make_params()
    found = {
        rounding: qjax.quantize(
            small.apply_fn,
            params,
            x,
            qjax.recipe(3, activation_ranges="dynamic", rounding=rounding, grid_size=8),
        )
        for rounding in ("nearest", "gptq")
    }
    y = small.apply_fn(params, x)
    for q in found.values():
        assert all(r.has_dynamic_input and not r.has_dynamic_output for r in q.report)
        assert all(r.output_bits is None and r.input_clip is None for r in q.report)
        assert "3/3d/–" in str(q.report)
        assert str(q.report).endswith("d: dynamic, the range is found at run time")
        measured = float(qjax.sqnr_db(y, q.apply_fn(q.params, x)))
        assert q.report[-1].output_sqnr_db == pytest.approx(measured, abs=0.01)
    nearest, gptq = (q.report[-1].output_sqnr_db for q in found.values())
    assert gptq > nearest - 0.5
