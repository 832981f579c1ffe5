"""A small stand-in for a pretrained model, and `qjax quantize` of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretrained
from pretrained import datasets
from pretrained.preprocessing import Preprocessing
from qjax.cli.main import main

PIXELS = Preprocessing(255.0, (0.0,), (1.0,))
CHEAP = ["--range-method", "absmax", "--no-bias-correction", "--input-bits", "float"]


class Model(NamedTuple):
    """A stand-in for what `pretrained.load` returns."""

    name: str
    apply_fn: Any
    params: Any
    preprocess: Any
    dataset: str


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"]["w"])
    return x @ params["head"]["w"]


def make_params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (16, 8), "head": (8, 10)}
    return {name: {"w": jnp.float32(rng.normal(size=s))} for name, s in shapes.items()}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """A model `tiny` of random weights; of the dataset `noise` 40 training, 300 test images."""
    rng = np.random.default_rng(0)
    sizes = {"train": 40, "test": 300}
    images = {split: rng.integers(0, 255, (n, 4, 4, 1), np.uint8) for split, n in sizes.items()}
    tiny = Model("tiny", apply_fn, make_params(), PIXELS, "noise")
    models = {"tiny": tiny}
    load_model, load_dataset = pretrained.load, datasets.load

    def load(name: str, split: str) -> datasets.Dataset:
        if name != "noise":
            return load_dataset(name, split)
        x = tiny.preprocess(images[split])
        labels = np.array(apply_fn(tiny.params, x).argmax(-1), np.int32)
        wrong = slice(len(labels) // 4)
        labels[wrong] = (labels[wrong] + 1) % 10
        return datasets.Dataset(images[split], labels, name)

    monkeypatch.setattr(pretrained, "load", lambda name: models.get(name) or load_model(name))
    monkeypatch.setattr(datasets, "load", load)
    return models


def quantize(*options: str) -> int:
    return main(["quantize", "--model", "tiny", *CHEAP, *options])
