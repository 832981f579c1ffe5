"""Measuring one cell of a table of accuracy: a network, a way to quantize it, a draw of images."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from accuracy_tables import Way

import pretrained
import qjax
from pretrained import datasets
from qjax.artifact import stored_bytes
from qjax.atomic import write
from qjax.fit.data_free import UnknownRangeError
from qjax.fit.ends import search_ends
from qjax.graph.layers import shapes_of
from qjax.placing import BATCH_SIZE
from qjax.recipe import Recipe
from qjax.run.tap import float_layers
from qjax.tuning.held_out import HeldOut
from qjax.tuning.tune import Settings, run_tuning

HELD_OUT = 2000  # training images
TUNED_ON = 4096  # unlabeled training images, those of the calibration among them
FLOAT = "float"

Line = dict[str, Any]  # what was measured


class Draw(NamedTuple):
    """Rows of the training images.

    Attributes:
      calibration: those to calibrate on.
      held_out: others to measure the error on.
      more: others to tune on in addition.
    """

    calibration: np.ndarray
    held_out: np.ndarray
    more: np.ndarray


class Measuring:
    """Measures a model; a network that cells share is quantized once, if they follow each other."""

    def __init__(self, name: str, calibration_size: int, networks: Path | None) -> None:
        """Loads the model and its images.

        Args:
          name: what `pretrained.load` takes.
          calibration_size: training images to draw, or all but one if there are fewer.
          networks: a folder to keep quantized networks in; None to keep none.
        """
        self.model = pretrained.load(name)
        self._label, self._networks = Path(name).name, networks
        self._images = datasets.load(self.model.dataset, "train").images
        self._test = datasets.load(self.model.dataset, "test")
        self.used = min(calibration_size, len(self._images) - 1)
        self._quantized: tuple[Any, qjax.Quantized, float] | None = None
        self._searched: dict[int, qjax.Quantized] = {}

    def of_float(self) -> Line:
        """The float network."""
        return self._tested({"top1": self._top1(self.model.apply_fn, self.model.params)})

    def of(self, way: Way, seed: int, error: str) -> Line:
        """One cell of a table.

        Args:
          way: how to quantize and evaluate.
          seed: of the calibration draw.
          error: the field of the measurements that the table shows.
        """
        draw = self._draw(seed, way.images or self.used)
        line: Line = {"calibration_images": len(draw.calibration)}
        try:
            q, line["seconds"] = self._quantize(way.recipe, way.has_images, seed, draw)
        except UnknownRangeError:  # no batch norm: the table has a dash
            return self._tested(line | {"top1": None, "error": None})
        if way.ends or way.is_tuned:
            q, more = self._refined(q, way, seed, draw)
            line |= more
        run = q if way.arithmetic is None else on_integers(q, way.arithmetic)
        held_out = self._inputs(draw.held_out)
        line |= {
            "weight_db": [record.weight_sqnr_db for record in q.report],
            "output_db": [record.output_sqnr_db for record in q.report],
            "bytes": stored_bytes(q),
            "error": logits_error(self.model, run, held_out),
            "top1": self._top1(run.apply_fn, q.params),
        }
        if error == "plain":
            found = HeldOut(self.model.apply_fn, self.model.params, held_out)
            line |= found.divergences(q).means._asdict()
        if run is not q:
            line["other_logits"] = differing(q, run, self.model.preprocess, self._test.images)
        return self._tested(line)

    def _draw(self, seed: int, used: int) -> Draw:
        count = len(self._images)
        drawn = datasets.calibration_draw(np.arange(count), used, seed)
        others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(count), drawn))
        more = others[HELD_OUT : HELD_OUT + max(0, TUNED_ON - used)]
        return Draw(drawn, others[:HELD_OUT], more)

    def _inputs(self, rows: np.ndarray) -> np.ndarray:
        """Training images as the network takes them."""
        return self.model.preprocess(self._images[rows])

    def _quantize(
        self, recipe: Recipe, has_images: bool, seed: int, draw: Draw
    ) -> tuple[qjax.Quantized, float]:
        """The quantized network and the seconds that it took."""
        used = len(draw.calibration)
        key = recipe, has_images, seed, used
        if self._quantized is None or self._quantized[0] != key:
            calibration = self._inputs(draw.calibration)
            given = calibration if has_images else shapes_of(calibration)
            work = partial(qjax.quantize, self.model.apply_fn, self.model.params, given, recipe)
            about = [self._label, recipe.to_json(), has_images, used, seed]
            self._quantized = key, *network_of(self._networks, about, self.model, work)
            self._searched = {}
        return self._quantized[1:]

    def _refined(
        self, q: qjax.Quantized, way: Way, seed: int, draw: Draw
    ) -> tuple[qjax.Quantized, Line]:
        """The network with ranges that are searched again, and tuned."""
        start = time.perf_counter()
        if way.ends not in self._searched:
            calibration = self._inputs(draw.calibration)
            self._searched[way.ends] = with_ends(q, self.model.params, calibration, way.ends)
        q, line = self._searched[way.ends], {}
        if way.is_tuned:
            unlabeled = self._inputs(np.concatenate([draw.calibration, draw.more]))
            settings = Settings(seed=seed)
            found = run_tuning(q, self.model.apply_fn, self.model.params, unlabeled, settings)
            q, line = found.q, {"is_kept": found.is_kept}
        return q, line | {"more_seconds": time.perf_counter() - start}

    def _top1(self, apply_fn: Callable[..., Any], params: Any) -> float:
        test = self._test
        return qjax.top1(
            apply_fn, params, test.images, test.labels, preprocess=self.model.preprocess
        )

    def _tested(self, line: Line) -> Line:
        return line | {"test_images": len(self._test.images)}


def network_of(
    folder: Path | None,
    about: Sequence[Any],
    model: pretrained.Pretrained,
    work: Callable[[], qjax.Quantized],
) -> tuple[qjax.Quantized, float]:
    """A quantized network and the seconds that it took, from a folder where it is there.

    Args:
      folder: of networks; None to keep none.
      about: what the network depends on, as JSON values.
      model: the float network.
      work: makes the quantized one.
    """
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = None if folder is None else folder / f"{name}.json"
    if folder is not None and file is not None and file.exists():
        return qjax.load(folder / name, model.apply_fn), json.loads(file.read_text())["seconds"]
    start = time.perf_counter()
    q = work()
    jax.block_until_ready(q.params)
    seconds = time.perf_counter() - start
    if folder is not None and file is not None:
        folder.mkdir(parents=True, exist_ok=True)
        qjax.save(folder / name, q)
        write(file, json.dumps({"seconds": seconds, "about": about}))
    return q, seconds


def with_ends(
    q: qjax.Quantized, params: Any, calibration: np.ndarray, count: int
) -> qjax.Quantized:
    """What `qjax.quantize` with `Recipe.end_search` gives, without fitting the layers again."""
    batches = calibration.reshape(-1, BATCH_SIZE, *calibration.shape[1:])
    network = q.apply_fn.network(batches[0])
    floats = float_layers(network, params)
    found = search_ends(network, floats, q.params, [jnp.asarray(batches)], count, lambda *_: None)
    return q._replace(params=found)


def on_integers(q: qjax.Quantized, arithmetic: str) -> qjax.Quantized:
    """The same network on integers."""
    return q._replace(apply_fn=qjax.integer(q, arithmetic=arithmetic))


def differing(
    q: qjax.Quantized, run: qjax.Quantized, preprocess: Any, images: Any, batch: int = 250
) -> int:
    """The images for which two evaluations of a network give other logits."""
    count = 0
    for start in range(0, len(images), batch):
        x = preprocess(images[start : start + batch])
        logits = (np.asarray(one.apply_fn(q.params, x)) for one in (q, run))
        count += int(np.sum(np.any(np.not_equal(*logits), axis=-1)))
    return count


def logits_error(
    model: pretrained.Pretrained, q: qjax.Quantized, x: Any, batch: int = 250
) -> float:
    """What quantization changes in the logits, as a share of their energy."""
    apply_fn = jax.jit(model.apply_fn)
    noise = signal = 0.0
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        logits = np.asarray(apply_fn(model.params, part), np.float64)
        noise += float(np.sum((np.asarray(q.apply_fn(q.params, part)) - logits) ** 2))
        signal += float(np.sum(logits**2))
    return noise / signal
