"""Rules of one's own for the evaluator: counting, and the depth of every value."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import models
import pytest

import qjax
from qjax.graph.jaxpr import is_literal
from qjax.graph.layers import Network, Site, find_layers
from qjax.graph.schedule import Activated, schedule
from qjax.run.interpreter import Rules, evaluate

CASES: dict[str, Any] = {case.id: case for case in models.CASES}


def counted(network: Network) -> tuple[collections.Counter[str], list[int]]:
    """How often each primitive and each kind of layer occurs, and how deep the outputs lie.

    A value is the number of layers on the longest way to it; no array is computed.
    """
    counts: collections.Counter[str] = collections.Counter()

    def layer(site: Site, parameters: None, depth: int) -> int:
        counts[site.layer.kind] += 1
        return depth + 1

    def activated(site: Site, parameters: None, depth: int) -> int:
        counts["activated"] += 1
        return depth

    def primitive(equation: Any, depths: list[Any]) -> list[int]:
        counts[equation.primitive.name] += 1
        pairs = zip(depths, equation.invars, strict=True)
        depth = max((depth for depth, atom in pairs if not is_literal(atom)), default=0)
        return [depth] * len(equation.outvars)

    def real(value: Any, atom: Any) -> Any:
        raise AssertionError("every primitive has a rule")

    flat = network.flat
    env = dict.fromkeys((*flat.params, *flat.inputs, *flat.constants), 0)
    steps = schedule(network)
    names = {s.primitive.name for s in steps if not isinstance(s, Site | Activated)}
    rules = Rules(layer, activated, dict.fromkeys(names, primitive), real)
    evaluate(steps, env, dict.fromkeys(site.layer.name for site in network.sites), rules)
    return counts, [env[var] for var in flat.outputs]


def network_of(id: str) -> Network:
    case = CASES[id]
    return find_layers(case.apply_fn, case.params, case.x)


@pytest.mark.parametrize("id", ["linen_cnn", "linen_resnet", "haiku_cnn", "two_inputs"])
def test_every_kind_of_layer_is_counted(id: str):
    counts, _ = counted(network_of(id))
    kinds = collections.Counter(layer.kind for layer in CASES[id].expected)
    assert {kind: counts[kind] for kind in kinds} == kinds
    assert counts["activated"] == len(CASES[id].expected)
    assert not counts["conv_general_dilated"] and not counts["dot_general"]


def test_primitives_between_the_layers_are_counted():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.sin(jnp.sin(x @ params["a"] + params["b"]))
        return jnp.cos(x @ params["c"]) * x

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((1, 4)), "c": jnp.ones((4, 4))}
    counts, depths = counted(find_layers(apply_fn, params, jnp.ones((2, 4))))
    assert counts == {"dense": 2, "activated": 2, "sin": 2, "cos": 1, "mul": 1}
    assert depths == [2]


def test_the_depth_is_that_of_the_longest_way():
    # A stem, two blocks of two convolutions with a shortcut, a head.
    assert counted(network_of("linen_resnet"))[1] == [1 + 2 + 2 + 1]
    assert set(counted(network_of("activations"))[1]) == {1}
    assert counted(network_of("two_inputs"))[1] == [1, 2], "norm, score"


def test_a_count_of_multiplications_on_real_values():
    """What has no rule is bound on real values: the network is evaluated along with the count."""
    case = CASES["plain_mlp"]
    network = network_of("plain_mlp")
    total = 0

    def layer(site: Site, kernel: jax.Array, x: jax.Array) -> jax.Array:
        nonlocal total
        total += site.layer.macs * len(x)
        return x @ kernel

    env = network.flat.constants | dict(zip(network.flat.inputs, [case.x], strict=True))
    kernels = {site.layer.name: w for site, (w, _) in zip(network.sites, case.params, strict=True)}
    rules = Rules(layer, lambda site, kernel, y: y, {}, lambda value, atom: value)
    evaluate(schedule(network), env, kernels, rules)
    assert total == 8 * (6 * 16 + 16 * 16 + 16 * 10)
    x = case.x
    for name in ("0", "1"):
        x = jax.nn.relu(x @ kernels[name])
    [output] = network.flat.outputs
    assert qjax.sqnr_db(jax.nn.softmax(x @ kernels["2"]), env[output]) > 100
