"""A number format of one's own, given in a recipe: powers of two as a codebook."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax import QuantSpec
from qjax.formats.base import Format, NumberFormat, Spec
from qjax.formats.spec import FORMATS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Powers:
    """Codes are positions in a table of levels, which the scale multiplies."""

    scale: jax.Array
    levels: jax.Array

    name: ClassVar[str] = "powers"
    is_uniform: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def dtype(self) -> Any:
        return np.dtype(np.uint8)

    @property
    def lowest(self) -> int:
        return 0

    @property
    def step(self) -> jax.Array:
        return self.scale

    def encode(self, x: jax.Array) -> jax.Array:
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return jnp.searchsorted(between, x / self.scale).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return self.scale * self.levels[codes.astype(jnp.int32)]

    def project(self, x: jax.Array) -> jax.Array:
        return x + jax.lax.stop_gradient(self.decode(self.encode(x)) - x)

    def scaled(self, factor: jax.Array) -> "Powers":
        return dataclasses.replace(self, scale=self.scale * factor)


def powers_of_two(spec: Spec) -> np.ndarray:
    """0 and ±1, ±1/2, ±1/4, …: 2^b − 1 levels."""
    positive = np.float32(0.5) ** np.arange(2 ** (spec.bits - 1) - 1, dtype=np.float32)
    return np.concatenate([-positive, np.zeros(1, np.float32), positive[::-1]])


def cover(low: Any, high: Any, spec: Spec, levels: Any) -> Powers:
    largest = jnp.maximum(-low, high)
    return Powers(jnp.where(largest > 0, largest, 1.0), jnp.asarray(levels))


POWERS = NumberFormat("powers", Powers, powers_of_two, cover, is_uniform=False)
SPEC = QuantSpec(4, format=POWERS)
LEVELS = [-(2.0**-k) for k in range(7)] + [0.0] + [2.0**-k for k in range(6, -1, -1)]

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(20, 20)) / np.sqrt(20) + np.eye(20)  # correlated inputs: GPTQ pays
X = jnp.asarray(RNG.normal(size=(256, 20)) @ MIX, jnp.float32)
PARAMS = {  # all of one shape, so that a recipe compiles for one layer
    "first": jnp.asarray(RNG.normal(size=(20, 20)) / 4, jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=(1, 20)) / 4, jnp.float32),
    "last": jnp.asarray(RNG.normal(size=(20, 20)) / 3, jnp.float32),
}


def network(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["last"]


def quantized(weights: QuantSpec = SPEC, **fields: Any) -> qjax.Quantized:
    recipe = qjax.recipe(8, weights=weights, **fields)
    return qjax.quantize(network, PARAMS, X, recipe)


def levels_of(layer: Any) -> np.ndarray:
    """The kernel decoded by hand, [patch, channels]."""
    codes = np.asarray(layer.kernel, np.int64)[0]
    blocks = layer.weights.scale.shape[1]
    scale = np.repeat(np.asarray(layer.weights.scale)[0], -(-len(codes) // blocks), axis=0)
    return np.asarray(LEVELS, np.float32)[codes] * scale[: len(codes)]


def test_it_is_a_format():
    format = POWERS.cover(jnp.float32(-3), jnp.float32(2), SPEC, POWERS.limits(SPEC))
    assert isinstance(format, Format)
    assert format.bits == 4
    np.testing.assert_array_equal(format.levels, LEVELS)
    np.testing.assert_array_equal(format.project(jnp.array([3.1, -1.4, 0.01])), [3.0, -1.5, 0.0])
    assert jax.grad(format.project)(0.3) == 1.0


NEAREST: dict[str, Any] = {"rounding": "nearest", "reconstructions": 0, "sweeps": 0}


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_every_method_of_rounding_takes_it(granularity: Any):
    spec = dataclasses.replace(SPEC, granularity=granularity, group_size=8)
    floats: dict[str, Any] = {"inputs": None, "outputs": None}
    found = {
        name: quantized(spec, **floats, **NEAREST | changes)
        for name, changes in {
            "nearest": {},
            "gptq": {"rounding": "gptq"},
            "swept": {"rounding": "gptq", "sweeps": 2},
            "default": {"rounding": "gptq", "sweeps": 2, "reconstructions": 3},
        }.items()
    }
    first = {name: q.report[0].output_sqnr_db for name, q in found.items()}
    assert first["nearest"] + 0.5 < first["gptq"] < first["swept"]
    y = network(PARAMS, X)
    whole = {n: float(qjax.sqnr_db(y, q.apply_fn(q.params, X))) for n, q in found.items()}
    assert whole["nearest"] + 0.5 < min(whole["gptq"], whole["swept"], whole["default"])
    kernels = {name: levels_of(q.params["layers"]["first"]) for name, q in found.items()}
    sqnr = {name: float(qjax.sqnr_db(PARAMS["first"], kernels[name])) for name in kernels}
    assert sqnr["nearest"] > sqnr["gptq"], "at the price of the kernel's error"


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "output_mse", "kl"])
def test_every_range_objective_takes_it(method: str):
    q = quantized(range_method=method)
    least = 9 if method == "kl" else 12  # which clips a kernel of few values hard
    assert float(qjax.sqnr_db(network(PARAMS, X), q.apply_fn(q.params, X))) > least


def test_fake_quantization_is_decoding_by_hand():
    q = quantized()
    first, last = q.params["layers"].values()
    assert not first.has_integer_accumulator and first.bias.dtype == jnp.float32

    def rounded(x: Any, qparams: Any) -> np.ndarray:
        scale, zero_point = np.float32(qparams.scale), np.float32(qparams.zero_point)
        codes = np.clip(np.rint(np.asarray(x) / scale), -zero_point, 255 - zero_point)
        return scale * codes.astype(np.float32)

    x = rounded(X, first.inputs)
    z = rounded(x @ levels_of(first) + np.asarray(first.bias), first.outputs)
    logits = np.maximum(z, 0) @ levels_of(last) + np.asarray(last.bias)
    found = np.asarray(q.apply_fn(q.params, X))
    off = np.abs(found - rounded(logits, last.outputs)) / float(last.outputs.scale)
    assert off.max() < 1.1 and np.mean(off > 0.1) < 0.01, "but for sums in another order"


def test_the_report_has_its_width_and_its_bytes():
    q = quantized()
    record = q.report[0]
    assert record.weight_bits == 4
    # codes, scales, table of levels, bias, and scale and zero point of input and output
    assert record.bytes_quantized == 20 * 20 // 2 + 4 * 20 + 4 * 15 + 4 * 20 + 2 * 8
    assert "4/8/8" in str(q.report)
    assert qjax.cost(q)[0].bit_operations == 20 * 20 * 4 * 8


def test_a_layer_is_explained():
    q = quantized()
    explanation = qjax.explain(q, "first", X[:1], PARAMS)
    found: dict[str, Any] = {step.name: step for step in explanation.steps}
    assert "the code of powers nearest to w / " in found["kernel codes"].equation
    assert found["kernel codes"].bits == 4
    assert found["sum of products and bias"].note == (
        "in float: its weights have values that are no multiples of a scale"
    )
    assert found["zero point and clamp"].sqnr_db > 10
    assert "equal to the network's own code in 100.00%" in found["zero point and clamp"].note
    assert max(map(len, str(explanation).splitlines())) <= 100


def test_packing_keeps_it():
    q = quantized()
    packed = qjax.pack(q.params)
    assert packed["layers"]["first"].kernel.stream.nbytes == 20 * 20 // 2
    y = jax.jit(lambda packed, x: q.apply_fn(qjax.unpack(packed), x))(packed, X)
    np.testing.assert_array_equal(y, q.apply_fn(q.params, X))


def test_an_artifact_holds_it_at_its_true_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    q = quantized(overrides={"last": {"weight_bits": 3}})
    qjax.save(tmp_path / "model", q)
    stored = load_file(next((tmp_path / "model").glob("model-*.safetensors")))
    for name, bits in {"first": 4, "last": 3}.items():
        kernel = q.params["layers"][name].kernel
        number = int.from_bytes(stored[f"layers/{name}/kernel"].tobytes(), "little")
        assert stored[f"layers/{name}/kernel"].nbytes == -(-kernel.size * bits // 8)
        codes = [(number >> i * bits) % 2**bits for i in range(kernel.size)]
        assert codes == kernel.reshape(-1).tolist()
    with pytest.raises(ValueError, match="format 'powers', which this qjax does not know"):
        qjax.load(tmp_path / "model", network)
    monkeypatch.setitem(FORMATS, POWERS.name, POWERS)
    again = qjax.load(tmp_path / "model", network)
    chex.assert_trees_all_equal(again.params, q.params, strict=True)
    logits = q.apply_fn(q.params, X)
    chex.assert_trees_all_equal(again.apply_fn(again.params, X), logits, strict=True)
    assert list(again.report) == list(q.report)
    assert again.report.recipe.to_json() == q.report.recipe.to_json()


@pytest.mark.parametrize("argument", ["inputs", "outputs"])
def test_for_activations_it_is_refused(argument: str):
    message = f"`{argument}` must have a uniform format; got powers, which is for weights"
    for spec in (SPEC, dataclasses.replace(SPEC, granularity="per_tensor")):
        with pytest.raises(ValueError, match=message):
            qjax.recipe(8, **{argument: spec})
        with pytest.raises(ValueError, match=message):
            qjax.recipe(8, overrides={"first": {argument: spec}})


def test_json_round_trip(monkeypatch: pytest.MonkeyPatch):
    given = qjax.recipe(
        8, weights=SPEC, overrides={"last": {"weights": QuantSpec(3, format=POWERS)}}
    )
    fields = json.loads(json.dumps(given.to_json()))
    assert fields["weights"]["format"] == "powers"
    with pytest.raises(
        ValueError, match="`format` must be one of uniform, binary, .*; got 'powers'"
    ):
        qjax.Recipe.from_json(fields)
    monkeypatch.setitem(FORMATS, POWERS.name, POWERS)
    again = qjax.Recipe.from_json(fields)
    assert again.weights == QuantSpec(4, format="powers")
    assert again.weights.family is POWERS
    assert again.to_json() == fields
    assert qjax.Recipe.from_json(again.to_json()) == again
