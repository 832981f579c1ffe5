"""Quantization-aware training of a reference model, by the loop that trained it.

The float network is quantized on training images, and training goes on from there with quantized
values in every forward pass. Batch norm is folded in.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn

import qjax
from pretrained import Pretrained, training
from pretrained.datasets import Dataset, calibration_draw
from pretrained.models import build
from pretrained.preprocessing import Preprocessing
from pretrained.recipes import RECIPES, Recipe
from qjax.qat import TrainableFunction

CALIBRATION_SIZE = 1024

# By dataset: how far images are shifted, whether they are mirrored.
AUGMENTATION = {recipe.dataset: (recipe.shift, recipe.flip) for recipe in RECIPES.values()}
# By method: the peak of the learning rate.
LEARNING_RATE = {"binary_connect": 0.05, "binary_connect_stochastic": 0.05}
DEFAULT_LEARNING_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class FineTuning(Recipe):
    """A recipe of quantization-aware training.

    Attributes:
      init_from: the model that training starts from.
      method: a name in `qjax.qat.METHODS`.
      quantization: the JSON of the `qjax.Recipe`.
    """

    init_from: str = ""
    method: str = "lsq"
    quantization: str = ""


def fine_tuning(
    loaded: Pretrained,
    method: str,
    recipe: qjax.Recipe,
    epochs: float,
    learning_rate: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    name: str = "",
) -> FineTuning:
    """Returns the recipe that trains a pretrained model further, quantized.

    Args:
      loaded: the model.
      method: a name in `qjax.qat.METHODS`.
      recipe: of its quantization.
      epochs: passes over the training split, or a part of one.
      learning_rate: the peak; by default the method's own.
      batch_size: images per step.
      seed: of the draw of calibration images, the order and the augmentation.
      name: of the run.
    """
    shift, flip = AUGMENTATION.get(loaded.dataset, (0, False))
    rate = LEARNING_RATE.get(method, DEFAULT_LEARNING_RATE)
    return FineTuning(
        name=name or f"{loaded.name}-{method}",
        dataset=loaded.dataset,
        model=_model(loaded),
        preprocessing=loaded.preprocess,
        epochs=epochs,  # pyright: ignore
        batch_size=batch_size,
        learning_rate=rate if learning_rate is None else learning_rate,
        weight_decay=1e-4,
        shift=shift,
        flip=flip,
        seed=seed,
        init_from=loaded.name,
        method=method,
        quantization=json.dumps(recipe.to_json()),
    )


def _model(loaded: Pretrained) -> nn.Module:
    if loaded.card:
        return build(loaded.card["architecture"])
    return loaded.apply_fn.__self__  # pyright: ignore  # weights converted from PyTorch


def prepare(
    loaded: Pretrained, recipe: FineTuning, data: Dataset, progress: Any = False
) -> "QuantizationAware":
    """Quantizes the model on training images and makes it trainable.

    Args:
      loaded: the model.
      recipe: of `fine_tuning`.
      data: its training split.
      progress: as of `qjax.quantize`.
    """
    size = min(CALIBRATION_SIZE, len(data.images))
    images = np.asarray(loaded.preprocess(calibration_draw(data.images, size, recipe.seed)))
    quantization = qjax.Recipe.from_json(json.loads(recipe.quantization))
    function, params = qjax.qat.prepare(
        loaded.apply_fn, loaded.params, images, recipe.method, quantization, progress=progress
    )
    return QuantizationAware(function, params, loaded.preprocess, images)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationAware:
    """A prepared network: a `training.Trainee`.

    Attributes:
      function: of `qjax.qat.prepare`.
      params: its params before the first step.
      preprocess: from pixels to network input.
      images: the preprocessed calibration images.
    """

    function: TrainableFunction
    params: Any
    preprocess: Preprocessing
    images: Any

    scans: ClassVar[bool] = False

    def start(self, image_shape: tuple[int, ...]) -> training.State:
        """See `Trainee`."""
        del image_shape
        return training.initial_state(jax.tree.map(np.array, self.params), {})

    def forward(
        self, params: Any, batch_stats: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """See `Trainee`."""
        return self.function(params, x, key), batch_stats

    def constrain(self, params: Any) -> Any:
        """See `Trainee`."""
        return self.function.constrain(params)

    def finish(self, state: training.State, images: jax.Array) -> Any:
        """See `Trainee`."""
        del images
        return state.average

    def predict(self, variables: Any, images: jax.Array) -> jax.Array:
        """See `Trainee`."""
        return _predict(self.function, self.preprocess, variables, images)

    def quantized(self, variables: Any) -> qjax.Quantized:
        """The trained network with its codes."""
        return qjax.qat.finish(self.function, variables, self.images)


@partial(jax.jit, static_argnums=(0, 1))
def _predict(
    function: Callable[..., Any], preprocess: Preprocessing, variables: Any, images: jax.Array
) -> jax.Array:
    return function(variables, preprocess(images)).argmax(axis=-1)
