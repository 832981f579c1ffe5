"""How far calibration images are from those of training, by what batch norm knows of them."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accuracy_pages import show
from markdown_tables import markdown_table

import pretrained
from pretrained import datasets
from qjax.atomic import write
from qjax.fit.suitability import UNLIKE, divergence
from qjax.graph.batch_norm import output_statistics
from qjax.graph.layers import find_layers, shapes_of
from qjax.graph.operation import along_channels
from qjax.run.fake import FAKE
from qjax.run.function import evaluated
from qjax.run.tap import float_layers
from qjax.table import table

DOCS = Path(__file__).parent.parent / "docs"
MODEL, IMAGES = "resnet20-cifar10", 64
HEADER = ("calibration images", "images", "nats, median of the layers", "greatest", "warned of")
ALIGN = "<>>><"

TEXT = """\
# Images unlike those in training

Measured by `python scripts/evaluate.py unlike`: {model}, the divergence of its layers' outputs on
calibration images from what batch norm knows of those in training, in nats, and whether
`qjax.quantize` warns. Images are drawn from the training images of CIFAR-10, and changed.

{table}
"""


def halved(images: np.ndarray) -> np.ndarray:
    """Half as large, and enlarged again by repeating pixels."""
    return images[:, ::2, ::2].repeat(2, 1).repeat(2, 2)


def noise(images: np.ndarray) -> np.ndarray:
    """Uniform noise of that shape."""
    return np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)


def numerals(images: np.ndarray) -> np.ndarray:
    """As many images of MNIST, with a black margin and three equal channels."""
    found = datasets.load("mnist", "train").images[: len(images)]
    return np.pad(found, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, 3)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "half as bright": lambda images: images // 2,
    "halved and enlarged": halved,
    "numerals of MNIST": numerals,
    "noise": noise,
}


def divergences(model: pretrained.Pretrained, x: Any) -> list[float]:
    """Those of all layers with batch norm."""
    network = find_layers(model.apply_fn, model.params, shapes_of(x))
    known = output_statistics(network, jax.tree.leaves(model.params))
    sites = [site for site in network.first_sites if site.layer.name in known]

    def moments(floats: Any, x: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        env = evaluated(network, FAKE, floats, x)
        found = {}
        for site in sites:
            y, operation = env[site.output], site.layer.operation
            axes = [axis % y.ndim for axis in operation.channel_axes]
            others = tuple(axis for axis in range(y.ndim) if axis not in axes)
            mean = jnp.mean(y, others).reshape(-1)
            centered = y - along_channels(operation, mean, y.ndim)
            deviation = jnp.sqrt(jnp.mean(jnp.square(centered), others)).reshape(-1)
            found[site.layer.name] = mean, deviation
        return found

    found = jax.jit(moments)(float_layers(network, model.params), x)
    return [divergence(known[name], *map(np.asarray, pair)) for name, pair in found.items()]


def run(arguments: argparse.Namespace) -> None:
    """Measures and writes the table."""
    del arguments
    model = pretrained.load(MODEL)
    train = datasets.load(model.dataset, "train")
    draw = partial(datasets.calibration_draw, seed=0)
    drawn = {f"{n} at random": draw(train.images, n) for n in (8, 16, IMAGES)}
    drawn["of one class"] = draw(train.images[train.labels == 0], IMAGES)
    drawn |= {name: change(draw(train.images, IMAGES)) for name, change in CHANGES.items()}
    rows = []
    for name, images in drawn.items():
        found = divergences(model, model.preprocess(images))
        median = statistics.median(found)
        said = "yes" if median > UNLIKE + 1 / len(images) else "no"
        rows.append((name, str(len(images)), f"{median:.3f}", f"{max(found):.3f}", said))
    print(table(HEADER, rows, ALIGN))
    text = markdown_table(HEADER, rows, ALIGN)
    write(DOCS / "results-unlike.md", TEXT.format(model=MODEL, table=text))
    show(DOCS / "calibration-data.md", "unlike", text)
