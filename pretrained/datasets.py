"""Image datasets as plain arrays: scikit-learn's digits, any TFDS one with `image` and `label`.

TFDS datasets are read from array_record files, without TensorFlow. Decoded arrays are cached as
they are stored, under the user's cache folder, keyed by name, version and split.
"""

import contextlib
import importlib.util
import io
import os
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrained import own_images
from qjax import atomic
from qjax.cache import cache_dir

HINT = """\
Prepare it once where there is a network and TensorFlow:
  pip install 'qjax[all,prepare]'
  python -c "import tensorflow_datasets as tfds; \
tfds.data_source('{name}'{data_dir})"
then point TFDS_DATA_DIR (or `data_dir`) at the folder that holds it."""


# Datasets, in all their configurations, whose images TFDS stores with rows and columns exchanged.
TRANSPOSED = frozenset({"emnist"})


class Dataset(NamedTuple):
    """Images uint8[N, H, W, C] with their labels int32[N], and the dataset's name."""

    images: np.ndarray
    labels: np.ndarray
    name: str


def load(
    name: str, split: str, data_dir: str | os.PathLike | None = None, cache: bool = True
) -> Dataset:
    """Loads one split of a dataset.

    Args:
      name: `digits` (8x8, values 0 to 16, shipped with scikit-learn) or a TFDS name such as
        `mnist`, `fashion_mnist`, `emnist/digits`, `cifar10`; or a folder of images by class, or an
        `.npz` file, see `own_images`.
      split: `train`, `test`, or another split that the dataset has.
      data_dir: where TFDS datasets are; by default the environment variable TFDS_DATA_DIR, then
        TFDS's own default.
      cache: keep the decoded arrays on disk, under XDG_CACHE_HOME or ~/.cache.

    Returns:
      The images, upright, in the order of their TFDS ids where they have ids (the official order),
      else in record order.

    Raises:
      ValueError: if the split does not exist or the dataset has no images with labels.
      ImportError: if TFDS, or TensorFlow to prepare a dataset for the first time, is missing.
      RuntimeError: if the dataset is neither prepared nor can be prepared.
    """
    if own_images.is_own(name):
        return Dataset(*own_images.load(name, split), name)
    if name == "digits":
        version, splits = _version_of_scikit_learn(), ("train", "test")
        decode, is_transposed = _split_digits, False
    else:
        builder = _builder(name, data_dir)
        version, splits = str(builder.version), sorted(builder.info.splits)
        decode, is_transposed = partial(_decode, builder, name), builder.name in TRANSPOSED
    if split not in splits:
        raise ValueError(f"`split` must be one of {list(splits)} for {name!r}, got {split!r}.")
    folder = cache_dir() / "datasets" / name / version
    files = [folder / f"{split}_{part}.npy" for part in ("images", "labels")]
    cached = _cached(*files) if cache else None
    if cached is not None:
        images, labels = cached
    else:
        images, labels = decode(split)
        if cache:
            # A cache folder that cannot be written costs time at the next call, nothing else.
            with contextlib.suppress(OSError):
                for file, array in zip(files, (images, labels), strict=True):
                    _save(file, array)
    if is_transposed:
        images = np.ascontiguousarray(images.swapaxes(1, 2))
    return Dataset(images, labels, name)


def calibration_draw(images: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Draws `size` different images, the same ones for the same seed.

    Args:
      images: [N, ...], a training split.
      size: how many to draw, 1 to N.
      seed: of the draw.

    Returns:
      [size, ...].

    Raises:
      ValueError: if `size` is not between 1 and N.
    """
    if not 1 <= size <= len(images):
        raise ValueError(
            f"`size` must be between 1 and {len(images)}, the number of images, got {size}."
        )
    return images[np.random.default_rng(seed).choice(len(images), size, replace=False)]


def _version_of_scikit_learn() -> str:
    try:
        return metadata.version("scikit-learn")
    except metadata.PackageNotFoundError as error:
        raise ImportError("`digits` needs scikit-learn: pip install 'qjax[all]'.") from error


def _split_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 embedded digits, split once and for all: 500 stratified images are `test`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=500, stratify=labels, random_state=0
    )
    rows = np.sort(train if split == "train" else test)
    return images[rows].reshape(-1, 8, 8, 1).astype(np.uint8), labels[rows].astype(np.int32)


def _builder(name: str, data_dir: str | os.PathLike | None):
    """The TFDS builder of a dataset, prepared as array_record files."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"`{name}` needs tensorflow-datasets: pip install 'qjax[all]'."
        ) from error
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    hint = HINT.format(name=name, data_dir=f", data_dir={str(data_dir)!r}" if data_dir else "")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"`name` must be 'digits' or a TFDS dataset, got {name!r}.") from error
    except Exception as error:  # TFDS, protobuf and json have their own each
        raise ValueError(
            f"`name` must be 'digits' or a TFDS dataset, and {name!r} cannot be read in "
            f"{data_dir or 'the folder of TFDS'}: {_line(error)}. Check name and version, or "
            "remove what is there and prepare it again."
        ) from error
    if builder.is_prepared():
        return builder
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"{name!r} is not prepared in {builder.data_dir}, and TensorFlow is missing.\n{hint}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise RuntimeError(
            f"{name!r} is not prepared in {builder.data_dir} and cannot be: {error}\n{hint}"
        ) from error
    return builder


def _cached(*files: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels of the cache, None if it has none or damaged ones."""
    try:
        images, labels = map(np.load, files)
    except (EOFError, OSError, ValueError):
        return None
    return (images, labels) if images.ndim == 4 and labels.shape == images.shape[:1] else None


def _line(error: Exception) -> str:
    """The beginning of an error, in one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or repr(error)


def _decode(builder: Any, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all images and labels of a split, ordered by id where records have one."""
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"`name` must be a dataset with `image` and `label`; {name!r} has {sorted(features)}."
        )
    try:
        records = list(builder.as_data_source(split=split))
    except Exception as error:  # array_record, protobuf and PIL have their own each
        raise ValueError(
            f"the records of {name!r} in {builder.data_dir} are damaged: {_line(error)}. Remove "
            "that folder and prepare it again."
        ) from error
    if "id" in features:
        records.sort(key=lambda record: record["id"])
    try:
        images = np.stack([record["image"] for record in records])
    except ValueError as error:
        raise ValueError(
            f"`name` must be a dataset of equally large images, got {name!r}."
        ) from error
    return images, np.array([record["label"] for record in records], np.int32)


def _save(file: Path, array: np.ndarray) -> None:
    """Writes `file` whole or not at all, whoever else is writing it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, array)
    atomic.write(file, content.getvalue())
