"""A small network for tests of what is written about networks: a convolution, ReLU, a dense layer.

It is quantized once, with the recipe that compiles fastest.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import qjax

CHEAP = qjax.Recipe().naive()


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    kernel, bias = params["conv"]["w"], params["conv"]["b"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dimensions)
    y = jax.nn.relu(y + bias)
    return y.mean((1, 2)) @ params["head"]["w"]


def make_params() -> Any:
    rng = np.random.default_rng(0)
    conv = {"w": rng.normal(size=(2, 2, 2, 6)) / 2, "b": rng.normal(size=(1, 1, 1, 6)) / 4}
    return jax.tree.map(jnp.float32, {"conv": conv, "head": {"w": rng.normal(size=(6, 4))}})


def images(count: int = 24) -> Any:
    return np.random.default_rng(1).normal(size=(count, 6, 6, 2)).astype(np.float32)


@functools.cache
def quantized(**changes: Any) -> qjax.Quantized:
    recipe = qjax.recipe(**{**{f: getattr(CHEAP, f) for f in _FIELDS}, **changes})
    return qjax.quantize(apply_fn, make_params(), images(), recipe)


def assert_codes_agree(q: qjax.Quantized, x: Any) -> None:
    """Integers and fake quantization have the same codes in every layer."""
    run = qjax.integer(q)
    for name, codes in q.apply_fn.codes(q.params, x).items():
        np.testing.assert_array_equal(run.codes(q.params, x)[name], codes)


def saved_and_loaded(q: qjax.Quantized, folder: Path) -> qjax.Quantized:
    """The network read again from an artifact, with the same params."""
    qjax.save(folder / "model", q)
    again = qjax.load(folder / "model", apply_fn)
    chex.assert_trees_all_equal(again.params, q.params, strict=True)
    return again


_FIELDS = (
    *("range_method", "reconstructions", "rounding", "sweeps", "bias_correction", "sequential"),
)


class Test(NamedTuple):
    """A test split, in the form of `pretrained.datasets.Dataset`."""

    images: Any
    labels: Any
    name: str


class Model(NamedTuple):
    """The float network, in the form of `pretrained.Pretrained`."""

    name: str
    apply_fn: Any
    params: Any
    preprocess: Any


def model() -> Model:
    return Model("small & <sound>", apply_fn, make_params(), lambda x: np.float32(x) / 128 - 1)


def test_split(count: int = 40) -> Test:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 255, (count, 6, 6, 1), np.uint8).repeat(2, -1)
    return Test(pixels, rng.integers(0, 4, count), "noise")
