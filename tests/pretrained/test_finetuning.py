"""Training a pretrained model with quantized values, resumed as if nothing had happened."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
import small

from pretrained import Pretrained, comparison, finetuning, training
from pretrained.datasets import Dataset
from pretrained.preprocessing import Preprocessing

PIXELS = Preprocessing(255.0, (0.5, 0.5), (0.25, 0.25))
LOADED = Pretrained("small", small.apply_fn, small.make_params(), PIXELS, "noise", {})


def split(seed: int, count: int) -> Dataset:
    """Images whose brightness is their label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count).astype(np.int32)
    noise = rng.integers(0, 64, (count, 6, 6, 2))
    return Dataset((noise + 64 * labels[:, None, None, None]).astype(np.uint8), labels, "noise")


DATA, HELD_OUT = split(0, 1600), split(1, 200)


def recipe(method: str, epochs: float = 6) -> finetuning.FineTuning:
    quantization = finetuning.quantization(method, 4, ends=None)
    return finetuning.fine_tuning(LOADED, method, quantization, epochs, 0.05)


class Killed(Exception):
    pass


def test_a_teacher_needs_no_labels(tmp_path: Path):
    unlabelled = DATA._replace(labels=np.zeros_like(DATA.labels))
    quantization = finetuning.quantization("lsq", 2, ends=None, weights_only=True)
    own = finetuning.fine_tuning(LOADED, "lsq", quantization, 4, 0.005, loss="teacher")
    result = finetuning.train(LOADED, own, unlabelled, HELD_OUT, tmp_path / "state")
    x = PIXELS(HELD_OUT.images)
    expected = LOADED.apply_fn(LOADED.params, x)
    trainee = finetuning.prepare(LOADED, own, DATA)

    def divergence(logits: Any) -> float:
        batch = finetuning.Batch(logits, HELD_OUT.labels, lambda: expected)
        return float(finetuning.from_teacher(batch))

    start = divergence(trainee.function(trainee.params, x))
    assert divergence(result.q.apply_fn(result.q.params, x)) < 0.8 * start


def test_an_unknown_loss_is_refused():
    quantization = finetuning.quantization("lsq", 4)
    with pytest.raises(ValueError, match="`loss` must be .*labels.*teacher.*; got 'students'"):
        finetuning.fine_tuning(LOADED, "lsq", quantization, 1, loss="students")


def test_training_learns_and_ends_alike_after_an_interruption(tmp_path: Path):
    own, log = recipe("lsq"), []
    whole = finetuning.train(LOADED, own, DATA, HELD_OUT, tmp_path / "a", on_entry=log.append)
    assert log[0].epoch == 0 and log[0].accuracy == whole.start
    assert whole.trained.log[-1].accuracy > max(whole.start, 25) + 20
    assert [entry for entry in log[1:]] == list(whole.trained.log)

    def kill(progress: training.Progress) -> None:
        if progress.step > training.CHUNK:
            raise Killed

    with pytest.raises(Killed):
        finetuning.train(LOADED, own, DATA, HELD_OUT, tmp_path / "b", kill)
    resumed = finetuning.train(LOADED, own, DATA, HELD_OUT, tmp_path / "b")
    chex.assert_trees_all_equal(resumed.trained.variables, whole.trained.variables, strict=True)
    chex.assert_trees_all_equal(resumed.q.params, whole.q.params, strict=True)


def test_the_quantized_network_has_the_accuracy_that_was_logged(tmp_path: Path):
    result = finetuning.train(LOADED, recipe("ste", 2), DATA, HELD_OUT, tmp_path / "state")
    q = result.q
    predicted = np.argmax(q.apply_fn(q.params, PIXELS(HELD_OUT.images)), axis=-1)
    assert 100 * np.mean(predicted == HELD_OUT.labels) == result.trained.log[-1].accuracy


def test_other_settings_have_another_state():
    own = recipe("lsq")
    changed = [dataclasses.replace(own, **c) for c in ({"seed": 1}, {"epochs": 3}, {"name": "x"})]
    changed.append(recipe("ste"))
    assert len({r.identifier for r in (own, *changed)}) == 5
    assert own.identifier == recipe("lsq").identifier


@pytest.mark.parametrize(
    ("method", "widths"),
    [
        ("lsq", [("uniform", 3, 3)]),
        ("binary_connect", [("binary", 3, 3)]),
        ("binary_weights", [("binary", 3, 3)]),
        ("xnor", [("binary", 1, 3)]),
    ],
)
def test_the_formats_of_a_method(method: str, widths: list):
    found = finetuning.quantization(method, 3).by_layer(["first", "middle", "last"])
    first, middle, last = found.values()
    for end in (first, last):
        assert end.weights and end.inputs and end.outputs
        assert (end.weights.bits, end.inputs.bits, end.outputs.bits) == (8, 8, 8)
    assert middle.weights and middle.inputs and middle.outputs
    assert [(middle.weights.family.name, middle.inputs.bits, middle.outputs.bits)] == widths
    alone = finetuning.quantization("lsq", 3, weights_only=True)
    assert alone.inputs is None and alone.outputs is None


def test_comparison_measures_both_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = [comparison.Case(4, "lsq", seed) for seed in (0, 1)]
    seen = []

    def compare(cases: list[comparison.Case]) -> dict[comparison.Case, comparison.Outcome]:
        return comparison.measure(
            LOADED, cases, 2, 8, DATA, HELD_OUT, tmp_path, lambda *item: seen.append(item)
        )

    first = compare(wanted[:1])
    quantization = finetuning.quantization("lsq", 4, 8)
    own = finetuning.fine_tuning(LOADED, "lsq", quantization, 2)
    alone = finetuning.train(LOADED, own, DATA, HELD_OUT, tmp_path / "alone")
    outcome = first[wanted[0]]
    assert outcome.post_training == alone.start
    assert outcome.trained == alone.trained.log[-1].accuracy
    assert outcome.bytes == sum(record.bytes_quantized for record in alone.q.report)
    assert outcome.quantizing_seconds > 0 and outcome.training_seconds > 0
    assert seen[-1][1:] == (0, 1) and "step 50 of 50" in seen[-1][0]

    both = compare(wanted)
    assert both[wanted[0]] == outcome
    trained = []
    monkeypatch.setattr(finetuning, "train", lambda *a, **k: trained.append(a))
    assert compare(wanted) == both and not trained


def test_comparison_shows_means_over_seeds():
    found = {
        comparison.Case(2, "lsq", seed): comparison.Outcome(90 + seed, 95 + seed, 3, 10, 1234)
        for seed in (0, 1, 2)
    }
    (row,) = comparison.rows(found, 8)
    assert row == ("2", "2/2/2", "lsq", "91.00 ± 1.00", "96.00 ± 1.00", "3", "10", "1,234")
