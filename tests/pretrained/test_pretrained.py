"""Reference models: their shapes, their weights, and the training that made them."""

import dataclasses
import json
import os
import pathlib
import runpy
import shutil
import sys
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pretrained
from pretrained import (
    augmentation,
    checkpoint,
    datasets,
    fast_convolution,
    fast_resnet,
    recipes,
    training,
)
from pretrained.models import MLP, LeNet5, build, describe
from pretrained.preprocessing import CIFAR10, DIGITS
from pretrained.recipes import Recipe
from pretrained.resnet import ResNet, resnet_cifar, resnet_imagenet

QUICK = {"xla_backend_optimization_level": 0}  # compile fast rather than to run fast
SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "train.py"

# (module, image shape, parameters): the counts are those of the papers and of PyTorch's models.
MODELS = {
    "MLP": (MLP(), (28, 28, 1), 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10),
    "LeNet5": (LeNet5(), (28, 28, 1), 61_470),
    "ResNet-20": (resnet_cifar(20), (32, 32, 3), 269_722),
    "ResNet-56": (resnet_cifar(56), (32, 32, 3), 853_018),
    "ResNet-18": (resnet_imagenet(18), (224, 224, 3), 11_689_512),
    "ResNet-34": (resnet_imagenet(34), (224, 224, 3), 21_797_672),
    "ResNet-50": (resnet_imagenet(50), (224, 224, 3), 25_557_032),
    "ResNet-18, small stem": (
        resnet_imagenet(18, num_classes=10, large_stem=False),
        (32, 32, 3),
        11_173_962,
    ),
}

TINY = Recipe(
    name="tiny",
    dataset="digits",
    model=MLP(widths=(32,)),
    preprocessing=DIGITS,
    epochs=6,
    batch_size=32,
    learning_rate=0.05,
    shift=1,
    flip=True,
    evaluate_every=3,
)
TINY_RESNET = dataclasses.replace(
    TINY, model=ResNet((1,), (4,)), batch_size=16, epochs=2, sizes=((1.0, 5),)
)


class Killed(Exception):
    pass


class Digits(NamedTuple):
    train: datasets.Dataset
    test: datasets.Dataset


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(datasets.load("digits", "train"), datasets.load("digits", "test"))


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_parameters_of_its_paper(name: str):
    model, shape, parameters = MODELS[name]
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    logits = jax.eval_shape(model.apply, variables, image)
    chex.assert_shape(logits, (1, model.num_classes))


@pytest.mark.parametrize("name", MODELS)
def test_description_of_a_model_builds_it_again(name: str):
    model, _, _ = MODELS[name]
    assert build(json.loads(json.dumps(describe(model)))) == model


def test_kernels_are_named_by_layer_block_and_convolution():
    image = jnp.zeros((1, 8, 8, 3))
    model = resnet_cifar(8, shortcut="projection")
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert set(params) == {"stem", "stem_bn", "layer1", "layer2", "layer3", "head"}
    assert set(params["layer2"]["block0"]) == {
        *("conv1", "bn1", "conv2", "bn2", "shortcut_conv", "shortcut_bn")
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resnet_cifar(18), "`depth` must be 6n.2 .*got 18"),
        (lambda: resnet_imagenet(20), r"`depth` must be one of \[18, 34, 50\], got 20"),
        (lambda: build({"family": "VGG"}), "`family` must be one of .*got 'VGG'"),
        (
            lambda: ResNet((1,), (4,), shortcut="none").init(
                jax.random.key(0), jnp.zeros((1, 8, 8, 3))
            ),
            "`shortcut` must be 'pad' or 'projection', got 'none'",
        ),
        (lambda: pretrained.load("vgg"), "`name` must be one of .*resnet20-digits.*got 'vgg'"),
        (lambda: CIFAR10(np.zeros((1, 8, 8, 1), np.uint8)), r"shape \[N, H, W, 3\], got \(1, 8, 8"),
    ],
)
def test_bad_argument_is_an_error_that_names_it(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_preprocessing_normalizes_pixels_and_takes_nothing_else():
    images = np.full((1, 2, 2, 3), 255, np.uint8)
    expected = (1 - np.array(CIFAR10.mean)) / np.array(CIFAR10.std)
    np.testing.assert_allclose(CIFAR10(images)[0, 1, 1], expected, rtol=1e-6)
    with pytest.raises(TypeError, match="`images` must be uint8 pixels, got float32"):
        CIFAR10(images.astype(np.float32))


@pytest.mark.parametrize("name", pretrained.names())
def test_shipped_model_is_the_one_of_its_card(name: str):
    model = pretrained.load(name)
    leaves = jax.tree.leaves(model.params["params"])
    assert sum(leaf.size for leaf in leaves) == model.card["parameters"]
    assert model.card["name"] == model.name == name
    assert model.card["accuracy"] == model.card["log"][-1]["accuracy"]
    recipe = recipes.RECIPES[name]
    assert describe(recipe.model) == describe(build(model.card["architecture"]))
    readme = (pretrained.FOLDER / name / "README.md").read_text()
    assert f"**{model.card['accuracy']:.2f} %**" in readme and model.card["sha256"] in readme


def test_shipped_digits_model_is_as_accurate_as_its_card_says(digits: Digits):
    model = pretrained.load("resnet20-digits")
    images, labels = digits.test.images, digits.test.labels
    predicted = jax.jit(model.apply_fn)(model.params, model.preprocess(images)).argmax(axis=-1)
    accuracy = 100 * float(np.mean(np.asarray(predicted) == labels))
    assert accuracy == pytest.approx(model.card["accuracy"]) and accuracy >= 98.5


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "card", "preprocessing", "architecture"])
def test_a_damaged_card_is_named(tmp_path: pathlib.Path, monkeypatch, text: str):
    shutil.copytree(pretrained.FOLDER / "lenet5-mnist", tmp_path / "lenet5-mnist")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    file = tmp_path / "lenet5-mnist" / "card.json"
    card = json.loads(file.read_text())
    file.write_text(json.dumps(card | {text: 1}) if text in card else text)
    with pytest.raises(ValueError, match=f"{file} is damaged.*Fetch it again"):
        pretrained.load("lenet5-mnist")


def test_damaged_weights_are_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(pretrained.FOLDER / "lenet5-mnist", tmp_path / "lenet5-mnist")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    assert pretrained.names() == ("lenet5-mnist",)
    file = tmp_path / "lenet5-mnist" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="must have the sha256 .*damaged.*train.py lenet5-mnist"):
        pretrained.load("lenet5-mnist")


@pytest.mark.parametrize(
    ("side", "size", "stride", "padding"),
    [(8, 3, 1, 1), (6, 3, 1, 1), (7, 3, 1, 1), (8, 3, 2, 1), (8, 1, 2, 0), (8, 5, 1, 0)],
)
def test_fast_convolution_and_its_gradients_are_exact(side, size, stride, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, side, side, 5))
    kernel = jax.random.normal(keys[1], (size, size, 5, 4))

    def plain(x, kernel):
        pads = ((padding, padding),) * 2
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=numbers
        )

    def fast(x, kernel):
        y = fast_convolution.convolve(x.transpose(3, 1, 2, 0), kernel, stride, padding)
        return y.transpose(3, 1, 2, 0)

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def run(convolve, x, kernel, cotangent):
        y, vjp = jax.vjp(convolve, x, kernel)
        return y, *vjp(cotangent)

    cotangent = jax.random.normal(keys[2], jax.eval_shape(plain, x, kernel).shape)
    expected, actual = (run(convolve, x, kernel, cotangent) for convolve in (plain, fast))
    chex.assert_trees_all_close(actual, expected, atol=3e-4)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_fast_training_pass_is_that_of_the_model(shortcut: str):
    model = ResNet((1, 1), (4, 8), shortcut=shortcut)
    x = jax.random.normal(jax.random.key(0), (8, 7, 7, 3))
    variables = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(1), x)
    weights = jax.random.normal(jax.random.key(2), (8, 10))

    def plain(params):
        variables_ = {**variables, "params": params}
        logits, new = model.apply(variables_, x, train=True, mutable=["batch_stats"])
        return (logits * weights).sum(), (logits, new["batch_stats"])

    def fast(params):
        logits, batch_stats = fast_resnet.apply(model, {**variables, "params": params}, x)
        return (logits * weights).sum(), (logits, batch_stats)

    expected, actual = (
        jax.jit(jax.grad(run, has_aux=True), compiler_options=QUICK)(variables["params"])
        for run in (plain, fast)
    )
    chex.assert_trees_all_close(actual, expected, atol=1e-4)


def test_shift_moves_images_and_mirrors_their_border():
    images = jnp.arange(2 * 5 * 5, dtype=jnp.uint8).reshape(2, 5, 5, 1)
    shifted = augmentation.shift(jax.random.key(3), images, 2)
    chex.assert_shape(shifted, images.shape)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded[..., 0], (5, 5), axis=(1, 2))
    for image, candidates in zip(np.asarray(shifted)[..., 0], windows, strict=True):
        assert any((image == candidate).all() for candidate in candidates.reshape(-1, 5, 5))
    chex.assert_trees_all_equal(augmentation.shift(jax.random.key(3), images, 0), images)


def test_mirror_flips_chosen_images_only():
    images = jnp.arange(2 * 3 * 3).reshape(2, 3, 3, 1)
    mirrored = augmentation.mirror(images, jnp.array([True, False]))
    chex.assert_trees_all_equal(mirrored, images.at[0].set(images[0, :, ::-1]))


def test_cross_entropy_is_that_of_smoothed_targets():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 3, 1, 1, 2])
    targets = 0.8 * jax.nn.one_hot(labels, 4) + 0.2 / 4
    expected = -(targets * jax.nn.log_softmax(logits)).sum(axis=1).mean()
    assert training.cross_entropy(logits, labels, 0.2) == pytest.approx(float(expected))


def test_learning_rate_rises_to_the_peak_and_falls_to_zero():
    recipe = dataclasses.replace(TINY, learning_rate=0.3, warmup=0.1)
    rates = np.array([training.learning_rate(recipe, 200, jnp.asarray(i)) for i in range(200)])
    assert rates.argmax() in (19, 20) and rates.max() == pytest.approx(0.3, rel=1e-3)
    assert rates[0] == pytest.approx(0.3 / 20) and rates[-1] == pytest.approx(0, abs=1e-6)


def test_every_epoch_takes_every_image_once():
    chunks = [training._order(TINY, 1297, chunk) for chunk in range(5)]
    rows, epochs = (
        np.concatenate([part.ravel() for part in parts]) for parts in zip(*chunks, strict=True)
    )
    for epoch in range(5):
        assert sorted(rows[epochs == epoch]) == list(range(1297))
    assert (rows[:1297] != rows[1297:2594]).any()


def test_interrupted_training_ends_where_uninterrupted_training_does(
    digits: Digits, tmp_path: pathlib.Path
):
    recipe = TINY_RESNET
    # Odd sides take the ResNet past `fast_convolution`'s large forms, which are slow to compile.
    digits = Digits(*(part._replace(images=part.images[:, :7, :7]) for part in digits))
    whole = training.train(recipe, digits.train, digits.test, tmp_path / "whole.safetensors")
    file = tmp_path / "state.safetensors"
    chunks_of_this_session = 0

    def kill(_: training.Progress):
        nonlocal chunks_of_this_session
        chunks_of_this_session += 1
        if chunks_of_this_session == 2:  # as kill -9 would: the second chunk is not saved
            raise Killed

    with pytest.raises(Killed):
        training.train(recipe, digits.train, digits.test, file, kill)
    resumed = training.train(recipe, digits.train, digits.test, file)
    chex.assert_trees_all_equal(resumed.variables, whole.variables, strict=True)
    assert [entry[:3] for entry in resumed.log] == [entry[:3] for entry in whole.log]
    assert [path.name for path in tmp_path.glob("state*")] == ["state.safetensors"]
    again = training.train(
        recipe, digits.train, digits.test, file, lambda _: pytest.fail("trained again")
    )
    chex.assert_trees_all_close(again.variables, whole.variables, rtol=1e-6)


def test_state_of_another_recipe_is_an_error(digits: Digits, tmp_path: pathlib.Path):
    file = tmp_path / "state.safetensors"
    state = training.FromScratch(TINY).start((8, 8, 1))
    checkpoint.write(file, dataclasses.replace(TINY, seed=1), state, checkpoint.History())
    with pytest.raises(ValueError, match="`state_file` .* another version of the recipe 'tiny'"):
        training.train(TINY, digits.train, digits.test, file)


def test_script_trains_and_writes_a_model_that_loads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(recipes.RECIPES, "tiny", dataclasses.replace(TINY, flip=False))
    out, states = tmp_path / "models", tmp_path / "states"
    monkeypatch.setattr(
        sys, "argv", ["train.py", "tiny", "--output", str(out), "--state-dir", str(states)]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "tiny epoch" in capsys.readouterr().out
    assert sorted(os.listdir(out / "tiny")) == ["README.md", "card.json", "model.safetensors"]
    monkeypatch.setattr(pretrained, "FOLDER", out)
    model = pretrained.load("tiny")
    assert model.dataset == "digits" and model.preprocess == DIGITS
    assert model.card["recipe"]["seed"] == 0 and model.card["seconds"] >= 0
    log = model.card["log"]
    assert log[-1]["loss"] < log[0]["loss"] < 2 and model.card["accuracy"] > 85
    assert model.card["command"] == "python scripts/train.py tiny"
    test = datasets.load("digits", "test")
    predicted = model.apply_fn(model.params, model.preprocess(test.images)).argmax(axis=-1)
    assert 100 * float(np.mean(np.asarray(predicted) == test.labels)) == pytest.approx(
        model.card["accuracy"]
    )
