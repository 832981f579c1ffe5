"""What a command works on: a pretrained model, calibration images and test images."""

from typing import Any, NamedTuple

import jax

import pretrained
from pretrained import datasets
from qjax.progress import Progress

CALIBRATION_SIZE = 1024  # training images, or all of them if there are fewer


class Loaded(NamedTuple):
    """A model with its images.

    Attributes:
      model: the pretrained model.
      calibration: preprocessed training images, drawn at random.
      test: the test split, not preprocessed.
    """

    model: pretrained.Pretrained
    calibration: Any
    test: datasets.Dataset


def load(
    model_name: str,
    dataset_name: str | None,
    calibration_size: int | None,
    seed: int,
    progress: Progress,
) -> Loaded:
    """Loads a model and its images.

    Args:
      model_name: what `pretrained.load` takes.
      dataset_name: what `datasets.load` takes; None for the model's own.
      calibration_size: training images to draw; None for `CALIBRATION_SIZE`.
      seed: of their draw.
      progress: called with (what is loaded, how much is done, how much there is).

    Raises:
      ValueError: there is no such model or dataset, or they do not go together.
    """
    progress("model", 0, 3)
    model = pretrained.load(model_name)
    name = dataset_name or model.dataset
    try:
        progress("training images", 1, 3)
        images = datasets.load(name, "train").images
        progress("test images", 2, 3)
        test = datasets.load(name, "test")
    except RuntimeError as error:  # the dataset could not be prepared
        raise ValueError(error) from error
    size = calibration_size or min(CALIBRATION_SIZE, len(images))
    calibration = model.preprocess(datasets.calibration_draw(images, size, seed))
    try:
        jax.eval_shape(model.apply_fn, model.params, calibration[:1])
    except Exception as error:  # each framework has its own
        raise ValueError(
            f"`--dataset` {name} has images of shape {images.shape[1:]}, which the model "
            f"{model.name} does not take; leave it out to use the model's own, {model.dataset}."
        ) from error
    progress("", 3, 3)
    return Loaded(model, calibration, test)
