"""A small stand-in for a pretrained model, and `qjax quantize` of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.cli.main import main

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


def quantize(*options: str) -> int:
    return main(["quantize", "--model", "tiny", *CHEAP, *options])
