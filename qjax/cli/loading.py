"""What a command works on: a pretrained model, calibration images and test images."""

import argparse
from collections.abc import Callable
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
      test: the test split of that dataset, or of another one; not preprocessed.
    """

    model: pretrained.Pretrained
    calibration: Any
    test: datasets.Dataset


def load(
    model_name: str,
    dataset_name: str | None,
    test_dataset_name: str | None,
    calibration_size: int | None,
    seed: int,
    progress: Progress,
) -> Loaded:
    """Loads a model and its images.

    Args:
      model_name: what `pretrained.load` takes.
      dataset_name: what `datasets.load` takes; None for the model's own.
      test_dataset_name: the dataset whose test split is loaded; None for the same one.
      calibration_size: training images to draw; None for `CALIBRATION_SIZE`.
      seed: of their draw.
      progress: called with (what is loaded, how much is done, how much there is).

    Raises:
      ValueError: there is no such model or dataset, or they do not go together.
    """
    progress("model", 0, 3)
    model = pretrained.load(model_name)
    name = dataset_of(model, dataset_name)
    progress("training images", 1, 3)
    images = _split("--dataset", name, "train").images
    size = calibration_size or min(CALIBRATION_SIZE, len(images))
    calibration = model.preprocess(datasets.calibration_draw(images, size, seed))
    try:
        logits = jax.eval_shape(model.apply_fn, model.params, calibration[:1])
    except Exception as error:  # each framework has its own
        own = f"; leave it out to use the model's own, {model.dataset}." if model.dataset else ""
        raise ValueError(
            f"`--dataset` {name} has images of shape {images.shape[1:]}, which the model "
            f"{model.name} does not take{own or f': {error}'}"
        ) from error
    progress("test images", 2, 3)
    is_other = test_dataset_name is not None
    option, test_name = ("--test-dataset", test_dataset_name) if is_other else ("--dataset", name)
    test = _split(option, test_name, "test")
    if is_other:
        _check_shape(test, images.shape[1:], model.name)
    if isinstance(logits, jax.ShapeDtypeStruct):  # of networks with several outputs it is a tree
        _check_labels(option, test, logits.shape[-1], model.name)
    progress("", 3, 3)
    return Loaded(model, calibration, test)


def add_dataset(add: Callable[..., Any]) -> None:
    """Declares which images a command takes, by a parser's or a group's `add_argument`."""
    add(
        "--dataset",
        metavar="NAME|PATH",
        help="digits, a TFDS name, a folder train/CLASS/IMAGE and test/CLASS/IMAGE, or an .npz "
        "file with x_train, y_train, x_test and y_test (the model's own)",
    )


def an_image(model: pretrained.Pretrained, dataset_name: str | None) -> Any:
    """The first test image of a dataset, as the model takes it: [1, H, W, C].

    Args:
      model: whose images they are.
      dataset_name: what `datasets.load` takes; None for the model's own.

    Raises:
      ValueError: there is no such dataset.
    """
    name = dataset_of(model, dataset_name)
    return model.preprocess(_split("--dataset", name, "test").images[:1])


def at_least_one(text: str) -> int:
    """Reads a number of images."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 image; got {text!r}")
    return int(text)


def dataset_of(model: pretrained.Pretrained, name: str | None) -> str:
    """The name of a dataset, by default the model's own.

    Raises:
      ValueError: neither is known.
    """
    if not (name or model.dataset):
        raise ValueError(
            f"`--dataset` must name the images of {model.name}: a TFDS name, a folder of images by "
            "class, or an .npz file."
        )
    return name or model.dataset


def _split(option: str, name: str, split: str) -> datasets.Dataset:
    """Loads the split of the dataset that an option names."""
    try:
        return datasets.load(name, split)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"`{option}` {name}: {error}") from error


def _check_shape(test: datasets.Dataset, shape: tuple[int, ...], model: str) -> None:
    """Refuses test images that a model was not calibrated on."""
    if test.images.shape[1:] != shape:
        raise ValueError(
            f"`--test-dataset` {test.name} has images of shape {test.images.shape[1:]}; the model "
            f"{model} is calibrated on images of shape {shape}. Name a dataset of such images."
        )


def _check_labels(option: str, test: datasets.Dataset, classes: int, model: str) -> None:
    """Refuses a test set that a model has no answers for."""
    if test.labels.max() >= classes:
        raise ValueError(
            f"`{option}` {test.name} has labels up to {test.labels.max()}; the model {model} has "
            f"{classes} classes, 0 to {classes - 1}. Name a dataset of these classes."
        )
