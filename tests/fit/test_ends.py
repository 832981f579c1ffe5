"""Ranges of the ends by the output of the network: what is searched, and what is taken."""

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
from qjax.fit import ends
from qjax.fit.scales import frame_of, key_of, moved, start
from qjax.graph.schedule import schedule

IMAGES = small.images(96)
PARAMS = small.make_params()
RECIPE = dataclasses.replace(qjax.recipe(3).naive(), sequential=True)
SEARCHED = dataclasses.replace(RECIPE, end_search=2)


def quantized(recipe: qjax.Recipe = RECIPE, **options: Any) -> qjax.Quantized:
    return qjax.quantize(small.apply_fn, PARAMS, IMAGES, recipe, **options)


def test_scales_move_where_that_helps_and_codes_stay(tmp_path: Path):
    before, after = quantized(), quantized(SEARCHED)
    assert after.report.recipe.end_search == 2
    moves = 0
    for name, layer in after.params["layers"].items():
        old = before.params["layers"][name]
        np.testing.assert_array_equal(layer.kernel, old.kernel)
        np.testing.assert_array_equal(layer.weights.scale, old.weights.scale)
        for field in ("inputs", "outputs"):
            ratio = float(getattr(layer, field).scale / getattr(old, field).scale)
            assert min(abs(ratio - factor) for factor in ends.FACTORS) < 1e-3
            moves += ratio != 1.0
    assert moves
    x = jnp.asarray(IMAGES)
    logits = small.apply_fn(PARAMS, x)
    found = [
        ends.divergence_of_classes(logits, q.apply_fn(q.params, x), ends.TEMPERATURE).mean()
        for q in (before, after)
    ]
    assert float(found[1]) < float(found[0])
    small.assert_codes_agree(after, x)
    assert small.saved_and_loaded(after, tmp_path).report == after.report
    assert after.report[0].output_scale == pytest.approx(
        float(after.params["layers"]["conv"].outputs.scale)
    )


def test_every_factor_is_measured_as_if_the_network_had_that_scale():
    q = quantized()
    x = jnp.asarray(IMAGES[:8])
    network = q.apply_fn.network(x)
    frame, wanted = frame_of(network, q.params), small.apply_fn(PARAMS, x)
    moving = start(frame, q.params)
    factors = np.log(np.float32([0.6, 1.0, 1.12]))
    steps = schedule(network)
    for place in dict.fromkeys(frame.owners.values()):
        position = ends._position(steps, frame, place)
        found = jax.jit(
            lambda u, place=place, position=position: ends._divergences(
                network, frame, position, place, q.params, moving, [x], wanted, u
            )
        )(factors)
        for u, losses in zip(factors, found, strict=True):
            grids = {**moving.grids, key_of(place): jnp.float32(u)}
            params = moved(frame, q.params, moving._replace(grids=grids), is_final=True)
            logits = q.apply_fn(params, x)
            by_example = ends.divergence_of_classes(wanted, logits, ends.TEMPERATURE)
            np.testing.assert_allclose(losses, by_example, rtol=1e-3, atol=1e-4)


def test_a_factor_must_be_better_on_either_half():
    same = ends.FACTORS.index(1.0)
    losses = np.ones((len(ends.FACTORS), 6))
    assert ends._choice(losses) == same
    losses[2] = (0.5, 1.1, 0.5, 1.1, 0.5, 1.1)
    assert ends._choice(losses) == same
    losses[4] = (0.9, 0.95, 0.9, 0.95, 0.9, 0.95)
    assert ends._choice(losses) == same  # the least mean is another one, which is refused
    losses[2] = 0.8
    assert ends._choice(losses) == 2


def test_layers_that_matter_most_follow_the_ends():
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (8, 8)) / 3 for i in range(4)}
    x = np.asarray(jax.random.normal(jax.random.key(9), (64, 8)))

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jax.nn.relu(x @ params[f"w{i}"])
        return x @ params["w3"]

    seen: dict[int, list[str]] = {}
    for count in (1, 2, 3, 4):
        items: list[str] = []
        recipe = dataclasses.replace(RECIPE, end_search=count)
        qjax.quantize(
            apply_fn, params, x, recipe, progress=lambda item, *_, i=items: i.append(item)
        )
        seen[count] = [item for item in items if item.startswith("range of")]
    assert seen[1] == ["range of inputs of w0", "range of outputs of w0"]
    # The input of w3 lies on the grid of the output of w2.
    assert seen[2] == [
        *seen[1],
        "range of outputs of w3",
    ]
    assert len(seen[3]) == 4 and len(seen[4]) == 5 and set(seen[3]) < set(seen[4])


def test_the_layers_of_a_checkpoint_do_not_depend_on_it(tmp_path: Path):
    quantized(checkpoint=tmp_path)
    seen: list[str] = []
    q = quantized(SEARCHED, checkpoint=tmp_path, progress=lambda item, *_: seen.append(item))
    assert "conv" not in seen
    chex.assert_trees_all_equal(q.params, quantized(SEARCHED).params, strict=True)


def test_a_search_that_was_killed_goes_on(tmp_path: Path):
    seen: list[str] = []

    def stop(item: str, done: int, total: int) -> None:
        seen.append(item)
        if item.startswith("range of outputs"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(SEARCHED, checkpoint=tmp_path, progress=stop)
    before = [item for item in seen if item.startswith("range of")]
    again: list[str] = []
    q = quantized(SEARCHED, checkpoint=tmp_path, progress=lambda item, *_: again.append(item))
    ranges = [item for item in again if item.startswith("range of")]
    assert before[-1] == ranges[0] and len(before) > 1 and not set(before[:-1]) & set(ranges)
    chex.assert_trees_all_equal(q.params, quantized(SEARCHED).params, strict=True)
    with pytest.raises(ValueError, match="is of another run: different settings"):
        quantized(dataclasses.replace(SEARCHED, end_search=1), checkpoint=tmp_path)


def of_vectors(params: Any, x: jax.Array) -> jax.Array:
    return small.apply_fn(params, x)[:, 0]


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match="`end_search` must be at least 0; got -1"):
        qjax.recipe(4, end_search=-1)
    with pytest.raises(ValueError, match="`end_search` looks at the output of the quantized"):
        qjax.recipe(4, end_search=2, sequential=False)
    with pytest.raises(ValueError, match="`end_search` tries scales that are no power_of_two"):
        qjax.recipe(4, end_search=2, fixed_point=True)
    with pytest.raises(ValueError, match="`end_search` needs a network that returns one array of"):
        qjax.quantize(of_vectors, PARAMS, IMAGES, SEARCHED)
    assert SEARCHED.naive().end_search == 0 and SEARCHED.without_data().end_search == 0
