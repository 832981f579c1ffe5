"""Layers that the steps of a loop share: one set of codes and one grid for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx_runtime
import pytest
from jax import lax
from models import array, normal, randomize, relaxed

import qjax
from qjax.graph.layers import find_layers
from qjax.quantize import Quantized
from qjax.run.tap import float_layers, tapped

STEPS = 3
X = normal(12, STEPS, 6)
NAIVE = qjax.recipe(8).naive()


class Recurrent(NamedTuple):
    """A network that repeats a cell.

    Attributes:
      looped: the function with the loop.
      unrolled: the same one without; what it starts with depends on x, as far as qjax can see.
      params: of both.
      names: of the layers.
    """

    looped: Callable[[Any, Any], Any]
    unrolled: Callable[[Any, Any], Any]
    params: Any
    names: tuple[str, ...]


def gru() -> Recurrent:
    """A GRU by hand, its kernels joined in every step; what reads the last state is no step."""

    def cell(p: Any, h: jax.Array, x: jax.Array) -> jax.Array:
        kernel = jnp.concatenate([p["reset"], p["update"]], 1)
        r, u = jnp.split(jax.nn.sigmoid(x @ p["in"]["gates"] + h @ kernel), 2, 1)
        n = jnp.tanh(x @ p["in"]["new"] + r * (h @ p["new"] + p["bias"][None]))
        return (1 - u) * n + u * h

    def looped(p: Any, x: jax.Array) -> Any:
        def step(h: jax.Array, x: jax.Array) -> Any:
            h = cell(p["cell"], h, x)
            return h, h

        h, hs = lax.scan(step, jnp.zeros((len(x), 6)), x.swapaxes(0, 1))
        return h @ p["head"]["w"], hs

    def unrolled(p: Any, x: jax.Array) -> Any:
        h, hs = 0 * x[:, 0], []
        for i in range(STEPS):
            h = cell(p["cell"], h, x[:, i])
            hs.append(h[None])
        return h @ p["head"]["w"], jnp.concatenate(hs)

    kernels: dict[str, Any] = {name: array(6, 6) for name in ("reset", "update", "new")}
    kernels |= {"bias": array(6), "in": {"gates": array(6, 12), "new": array(6, 6)}}
    names = ("cell/in/gates", "cell/reset", "cell/in/new", "cell/new", "head")
    return Recurrent(
        looped, unrolled, randomize({"cell": kernels, "head": {"w": array(6, 3)}}), names
    )


def linear() -> Recurrent:
    """A recurrence of a product alone; after the last step come a scale and a ReLU."""

    def looped(p: Any, x: jax.Array) -> jax.Array:
        h = lax.fori_loop(0, STEPS, lambda i, h: h @ p["w"], x[:, 0])
        return jax.nn.relu(h * p["scale"][None])

    def unrolled(p: Any, x: jax.Array) -> jax.Array:
        h = x[:, 0]
        for _ in range(STEPS):
            h = h @ p["w"]
        h = jnp.flip(jnp.flip(h))  # so that what follows is not folded into the last product
        return jax.nn.relu(h * p["scale"][None])

    return Recurrent(looped, unrolled, randomize({"w": array(6, 6), "scale": array(6)}), ("w",))


CELLS = {"gru": gru, "linear": linear}
each_cell = pytest.mark.parametrize("cell", [make() for make in CELLS.values()], ids=CELLS)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def without_loop(cell: Recurrent, q: Quantized) -> Quantized:
    """The network without its loop, on the codes of the one with it."""
    sites = find_layers(cell.looped, cell.params, X).sites
    network = find_layers(cell.unrolled, cell.params, X)
    pairs = list(zip(sites, network.sites, strict=True))
    layers = {own.layer.name: q.params["layers"][site.layer.name] for site, own in pairs}
    own = qjax.quantize(cell.unrolled, cell.params, X, qjax.Recipe().naive())
    assert layers.keys() == own.params["layers"].keys()
    return Quantized(own.apply_fn, {"layers": layers, "rest": q.params["rest"]}, own.report)


@pytest.mark.parametrize(
    ("cell", "recipe"), [(gru(), qjax.recipe(4, sweeps=0)), (linear(), NAIVE)], ids=CELLS
)
def test_steps_share_codes_and_grids(cell: Recurrent, recipe: qjax.Recipe, tmp_path: Any):
    q = qjax.quantize(cell.looped, cell.params, X, recipe)
    assert tuple(record.name for record in q.report) == cell.names
    other = without_loop(cell, q)
    assert_same(q.apply_fn(q.params, X), other.apply_fn(other.params, X))
    assert_same(qjax.integer(q)(q.params, X), qjax.integer(other)(other.params, X))
    qjax.save(tmp_path / "model", q)
    loaded = qjax.load(tmp_path / "model", cell.looped)
    assert_same(loaded.apply_fn(loaded.params, X), q.apply_fn(q.params, X))


def test_a_grid_holds_the_values_of_all_steps():
    apply_fn = linear().looped
    params = {"w": 2 * jnp.eye(6), "scale": jnp.ones(6)}
    q = qjax.quantize(apply_fn, params, X, NAIVE)
    layer, largest = q.params["layers"]["w"], float(jnp.abs(X[:, 0]).max())
    np.testing.assert_allclose(np.abs(layer.inputs.range).max(), 2 ** (STEPS - 1) * largest, 0.01)
    np.testing.assert_allclose(np.abs(layer.outputs.range).max(), 2**STEPS * largest, 0.01)
    assert (layer.kernel.shape, q.report[0].macs) == ((1, 6, 6), STEPS * 36)


def lstm() -> tuple[Any, Any]:
    model = nn.RNN(nn.LSTMCell(6))
    variables = jax.eval_shape(relaxed(model.init), jax.random.key(0), X)
    return relaxed(model.apply), randomize(variables)


def test_a_cell_of_linen_has_a_layer_for_every_kernel_whatever_the_number_of_steps():
    apply_fn, params = lstm()
    q = qjax.quantize(apply_fn, params, X, NAIVE)
    assert {record.name for record in q.report} == {f"cell/{a}{b}" for a in "ih" for b in "ifgo"}
    assert q.params["rest"] == {}
    x = normal(5, STEPS + 1, 6)
    codes, integers = q.apply_fn.codes(q.params, x), qjax.integer(q).codes(q.params, x)
    assert {name: array.shape for name, array in codes.items()} == dict.fromkeys(codes, (20, 6))
    assert_same(codes, integers)


def test_what_a_tap_shows_are_the_values_of_all_steps():
    cell = linear()
    floats = float_layers(find_layers(cell.looped, cell.params, X), cell.params)
    _, taps = tapped(cell.looped, cell.params, X)(floats, X)
    h = [X[:, 0]]
    for _ in range(STEPS):
        h.append(h[-1] @ cell.params["w"])
    np.testing.assert_allclose(taps["w"].input, jnp.concatenate(h[:-1]), 1e-5, 1e-6)
    np.testing.assert_allclose(taps["w"].output, jnp.concatenate(h[1:]), 1e-5, 1e-6)


@each_cell
def test_onnx_runtime_computes_the_same(cell: Recurrent):
    q = onnx_runtime.quantized(cell.looped, cell.params, X)
    found = onnx_runtime.run(qjax.to_onnx(q, X), X).outputs
    for a, b in zip(found, jax.tree.leaves(q.apply_fn(q.params, X)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_sums_and_outputs_after_the_activation_have_grids_too():
    cell = linear()

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda h, x: (jax.nn.relu(h @ params["w"]) + x, None)  # noqa: E731
        return lax.scan(step, jnp.zeros((len(x), 6)), x.swapaxes(0, 1))[0]

    recipe = qjax.recipe(8, sums="quantized", output_position="both").naive()
    q = qjax.quantize(apply_fn, cell.params, X, recipe)
    assert q.params["layers"]["w"].activated is not None
    assert len(q.report.sums) > 0
    assert float(qjax.sqnr_db(apply_fn(cell.params, X), q.apply_fn(q.params, X))) > 25


def test_a_killed_run_goes_on_within_a_loop(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    cell = gru()
    whole = qjax.quantize(cell.looped, cell.params, X, NAIVE)
    monkeypatch.setattr("qjax.kept_arrays.PAUSE", 0)

    def kill(name: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    run = functools.partial(
        qjax.quantize, cell.looped, cell.params, X, NAIVE, checkpoint=tmp_path / "kept"
    )
    with pytest.raises(KeyboardInterrupt):
        run(progress=kill)
    assert_same(run().params, whole.params)


def test_trained_codes_are_shared_too():
    cell = linear()
    trained, params = qjax.qat.prepare(cell.looped, cell.params, X, recipe=NAIVE)
    assert tuple(params["layers"]) == cell.names
    q = qjax.qat.finish(trained, params, X)
    np.testing.assert_allclose(q.apply_fn(q.params, X), trained(params, X), 1e-5, 1e-5)
