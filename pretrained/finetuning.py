"""Quantization-aware training of a reference model, by the loop that trained it.

The float network is quantized on training images, and training goes on from there with quantized
values in every forward pass. Batch norm is folded in.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from pretrained import Pretrained, checkpoint, training
from pretrained.datasets import Dataset, calibration_draw
from pretrained.preprocessing import Preprocessing
from pretrained.recipes import RECIPES, Recipe
from qjax.formats.spec import check_choice
from qjax.objectives.divergence import divergence_of_classes
from qjax.qat import METHODS, TrainableFunction
from qjax.tuning.tune import TEMPERATURE

CALIBRATION_SIZE = 1024
BATCH_SIZE = 64
ENDS = 8  # bits of the first and of the last layer

# By dataset: how far images are shifted, whether they are mirrored.
AUGMENTATION = {recipe.dataset: (recipe.shift, recipe.flip) for recipe in RECIPES.values()}
# By method: the peak of the learning rate, the one of least training loss on mlp-mnist.
LEARNING_RATE = {"xnor": 0.1}
DEFAULT_LEARNING_RATE = 0.01


class Batch(NamedTuple):
    """What a loss sees of a step.

    Attributes:
      logits: of the network that is trained, float[N, K].
      labels: int32[N].
      teacher: computes the logits of the float network.
    """

    logits: jax.Array
    labels: jax.Array
    teacher: Callable[[], jax.Array]


def from_labels(batch: Batch) -> jax.Array:
    """The mean cross-entropy."""
    return training.cross_entropy(batch.logits, batch.labels, 0.0)


def from_teacher(batch: Batch) -> jax.Array:
    """How far the classes' probabilities are from the float network's, as `qjax.tune` measures it.

    References:
      Hinton et al., 2015, arXiv:1503.02531, section 2.
    """
    return jnp.mean(divergence_of_classes(batch.teacher(), batch.logits, TEMPERATURE))


LOSSES = {"labels": from_labels, "teacher": from_teacher}


@dataclasses.dataclass(frozen=True)
class FineTuning(Recipe):
    """A recipe of quantization-aware training.

    Attributes:
      init_from: the model that training starts from.
      method: a name in `qjax.qat.METHODS`.
      quantization: the JSON of the `qjax.Recipe`.
      loss: a name in `LOSSES`.
    """

    init_from: str = ""
    method: str = "lsq"
    quantization: str = ""
    loss: str = "labels"

    @property
    def identifier(self) -> str:
        """A name for files: other settings have another."""
        digest = hashlib.sha256(checkpoint.fingerprint(self).encode()).hexdigest()
        return f"{Path(self.name).stem}-{digest[:12]}"


def quantization(
    method: str, bits: int, ends: int | None = ENDS, weights_only: bool = False
) -> qjax.Recipe:
    """Returns the formats that a method trains.

    Args:
      method: a name in `qjax.qat.METHODS`; kernels have one bit where it is for such, and inputs
        too where it reads them as signs.
      bits: width of everything else.
      ends: width of the first and of the last layer; None for the others'.
      weights_only: leave inputs and outputs in float.

    Examples:
      >>> quantization("binary_connect", 8).weights.format, quantization("lsq", 3).inputs.bits
      ('binary', 3)
    """
    chosen = METHODS[method]
    fields: dict[str, Any] = {"weight_bits": 1} if chosen.needs_binary else {}
    fields |= {"input_bits": 1} if chosen.binarizes_inputs else {}
    fields |= {"inputs": None, "outputs": None} if weights_only else {}
    return qjax.recipe(bits, first_last_bits=ends, **fields)


def fine_tuning(
    loaded: Pretrained,
    method: str,
    recipe: qjax.Recipe,
    epochs: float,
    learning_rate: float | None = None,
    seed: int = 0,
    loss: str = "labels",
) -> FineTuning:
    """Returns the recipe that trains a pretrained model further, quantized.

    Args:
      loaded: the model.
      method: a name in `qjax.qat.METHODS`.
      recipe: of its quantization.
      epochs: passes over the training split, or a part of one.
      learning_rate: the peak; by default the method's own.
      seed: of the draw of calibration images, the order and the augmentation.
      loss: `labels`, or `teacher`: the classes' probabilities of the float network.

    Raises:
      ValueError: the model is of the user's own, with a `preprocess` that is no `Preprocessing`; or
        the loss is unknown.
    """
    check_choice("loss", loss, LOSSES)
    if not isinstance(loaded.preprocess, Preprocessing):
        raise ValueError(
            f"{loaded.name} can be trained only with a pretrained.preprocessing.Preprocessing as "
            "`preprocess`; return one as the third value."
        )
    shift, flip = AUGMENTATION.get(loaded.dataset, (0, False))
    rate = LEARNING_RATE.get(method, DEFAULT_LEARNING_RATE)
    return FineTuning(
        name=f"{loaded.name}-{method}",
        dataset=loaded.dataset,
        model=None,  # pyright: ignore  # `init_from` says it
        preprocessing=loaded.preprocess,
        epochs=epochs,  # pyright: ignore
        batch_size=BATCH_SIZE,
        learning_rate=rate if learning_rate is None else learning_rate,
        weight_decay=1e-4,
        shift=shift,
        flip=flip,
        seed=seed,
        init_from=loaded.name,
        method=method,
        quantization=json.dumps(recipe.to_json()),
        loss=loss,
    )


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
    images = np.asarray(recipe.preprocessing(calibration_draw(data.images, size, recipe.seed)))
    quantization = qjax.Recipe.from_json(json.loads(recipe.quantization))
    function, params = qjax.qat.prepare(
        loaded.apply_fn, loaded.params, images, recipe.method, quantization, progress=progress
    )
    teacher = partial(loaded.apply_fn, loaded.params)
    return QuantizationAware(
        function, params, recipe.preprocessing, images, teacher, LOSSES[recipe.loss]
    )


class Result(NamedTuple):
    """A network that was trained with quantized values.

    Attributes:
      q: the quantized network.
      start: top-1 in percent before training, on the test images.
      quantizing_seconds: of quantizing it, compilation among them.
      trained: the log, the seconds of training.
    """

    q: qjax.Quantized
    start: float
    quantizing_seconds: float
    trained: training.Trained


def train(
    loaded: Pretrained,
    recipe: FineTuning,
    data: Dataset,
    held_out: Dataset,
    state_file: Path,
    on_progress: Callable[[training.Progress], None] = lambda _: None,
    on_entry: Callable[[training.Entry], None] = lambda _: None,
) -> Result:
    """Trains a pretrained model with quantized values, from its start or from where it stopped.

    Args:
      loaded: the model.
      recipe: of `fine_tuning`.
      data: the training split.
      held_out: the split whose accuracy is logged and steers nothing.
      state_file: where the state is kept, replaced after every chunk of steps.
      on_progress: called after every chunk.
      on_entry: called with every new line of the log; the first is that of the start.
    """
    before = time.perf_counter()
    trainee = prepare(loaded, recipe, data)
    seconds = time.perf_counter() - before
    start = training.evaluate(trainee, trainee.params, held_out)
    on_entry(training.Entry(0.0, float("nan"), start, 0.0))
    trained = training.train(recipe, data, held_out, state_file, on_progress, on_entry, trainee)
    return Result(trainee.quantized(trained.variables), start, seconds, trained)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationAware:
    """A prepared network: a `training.Trainee`.

    Attributes:
      function: of `qjax.qat.prepare`.
      params: its params before the first step.
      preprocess: from pixels to network input.
      images: the preprocessed calibration images.
      teacher: the float network, a function of preprocessed images.
      loss_fn: one of `LOSSES`.
    """

    function: TrainableFunction
    params: Any
    preprocess: Preprocessing
    images: Any
    teacher: Callable[[jax.Array], jax.Array]
    loss_fn: Callable[[Batch], jax.Array]

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

    def loss(self, logits: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
        """See `Trainee`."""
        return self.loss_fn(Batch(logits, labels, partial(self.teacher, x)))

    def constrain(self, params: Any) -> Any:
        """See `Trainee`."""
        return self.function.constrain(params)

    def finish(self, state: training.State, images: jax.Array) -> Any:
        """See `Trainee`."""
        del images
        return state.average

    def predict(self, variables: Any, images: jax.Array) -> jax.Array:
        """See `Trainee`."""
        return training.predict(self.function, self.preprocess, variables, images)

    def quantized(self, variables: Any) -> qjax.Quantized:
        """The trained network with its codes."""
        return qjax.qat.finish(self.function, variables, self.images)
