"""What one inference costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.study.cost import MODELS, EnergyModel

RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32) for name in ("a", "b")}
X = RNG.normal(size=(16, 6)).astype(np.float32)
RECIPE = qjax.recipe(8, weight_bits=4, overrides={"b": {"weights": None}}).naive()


@pytest.fixture(scope="module")
def q() -> qjax.Quantized:
    return qjax.quantize(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], PARAMS, X, RECIPE)


def test_the_classroom_model_counts_operations(q: qjax.Quantized):
    quantized, in_float = qjax.cost(q, accumulator_bits={"a": 20})
    assert (quantized.macs, quantized.multiplications, quantized.additions) == (36, 36, 36)
    assert quantized.bit_operations == 36 * 4 * 8
    assert quantized.energy == 36 * (4 * 8) + 36 * 20
    assert quantized.activation_bytes == 6 + 6
    assert quantized.weight_bytes == q.report[0].bytes_quantized
    assert in_float.bit_operations == 36 * 32 * 32
    assert in_float.energy == 36 * (32 * 32) + 36 * 32


def test_picojoules_are_the_published_ones_at_published_widths(q: qjax.Quantized):
    model = MODELS["picojoules"]
    assert model.multiply(8, 8, False) == pytest.approx(0.2)
    assert model.multiply(32, 32, False) == pytest.approx(3.1)
    assert (model.add(8, False), model.add(32, False)) == pytest.approx((0.03, 0.1))
    assert (model.multiply(32, 32, True), model.add(32, True)) == (3.7, 0.9)
    assert qjax.cost(q, model="picojoules").total.energy > 0


def test_the_total_is_the_sum_and_ends_the_table(q: qjax.Quantized):
    found = qjax.cost(q)
    assert found.total.energy == sum(layer.energy for layer in found)
    lines = str(found).splitlines()
    assert lines[-1].startswith("2 layers") and max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[2:4]] == ["a", "b"]


def test_a_model_of_ones_own(q: qjax.Quantized):
    own = EnergyModel("clicks", lambda b_w, b_x, in_float: 1.0, lambda bits, in_float: 0.0, 0.0)
    assert qjax.cost(q, model=own).total.energy == 72


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "joules"}, "`model` must be one of bits, picojoules; got 'joules'"),
        ({"accumulator_bits": {"c": 9}}, "`accumulator_bits` names c; the layers are a, b"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str, q: qjax.Quantized):
    with pytest.raises(ValueError, match=message):
        qjax.cost(q, **options)
