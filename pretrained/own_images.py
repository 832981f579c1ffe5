"""Images of the user's own: a folder with a folder for every class, or an `.npz` file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})


class Images(NamedTuple):
    """Images uint8[N, H, W, C] with their labels int32[N]."""

    images: np.ndarray
    labels: np.ndarray


def is_own(name: str) -> bool:
    """Whether a name is that of a folder or of a file here, and not of a public dataset."""
    path = Path(name)
    return path.suffix == ".npz" or (path.is_dir() and any(path.iterdir()))


def load(name: str, split: str) -> Images:
    """Reads one split.

    Args:
      name: of an `.npz` file with x_train, y_train, x_test and y_test, images uint8[N, H, W] or
        [N, H, W, C] and labels [N]; or of a folder with folders `train` and `test` (or `val`), each
        with a folder of images for every class. Where all of them are named by numbers, these are
        the classes; else they are numbered in the order of their names.
      split: `train` or `test`.

    Raises:
      ValueError: something of that is missing; the images differ in size.
      ImportError: images are to be decoded, and pillow is missing.
    """
    read = _read_arrays if Path(name).suffix == ".npz" else _read_folder
    images, labels = read(Path(name), split)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} must hold images uint8[N, H, W, C] and a label for each; got {images.dtype} "
            f"{list(images.shape)} and labels {list(labels.shape)}."
        )
    if not len(images):
        raise ValueError(f"{name} holds no image of the split {split!r}.")
    return Images(images, labels.astype(np.int32))


def _read_arrays(path: Path, split: str) -> Images:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Images(arrays[f"x_{split}"], arrays[f"y_{split}"].reshape(-1))
    except KeyError as error:
        raise ValueError(f"{path} must hold x_{split} and y_{split}; {error}.") from error
    except Exception as error:  # zipfile, zlib and numpy have their own each
        raise ValueError(f"{path} is no .npz file with arrays: {error}.") from error


def _read_folder(path: Path, split: str) -> Images:
    names = {"test": ("test", "val")}.get(split, (split,))
    folder = next((path / name for name in names if (path / name).is_dir()), None)
    if folder is None:
        raise ValueError(
            f"{path} must hold a folder {' or '.join(names)} with a folder for every class."
        )
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    are_numbers = all(entry.name.isdecimal() for entry in classes)
    files = [
        (file, int(entry.name) if are_numbers else position)
        for position, entry in enumerate(classes)
        for file in sorted(entry.iterdir())
        if file.suffix.lower() in ENDINGS
    ]
    if not files:
        raise ValueError(
            f"{folder} must hold a folder of images ({', '.join(sorted(ENDINGS))}) for every class."
        )
    return Images(_decoded([file for file, _ in files]), np.array([label for _, label in files]))


def _decoded(files: Sequence[Path]) -> np.ndarray:
    """Decodes images of one size, in grey if the first is grey, else in color."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading image files needs pillow: pip install 'qjax[all]'.") from error
    images, mode = [], None
    for file in files:
        try:
            with Image.open(file) as image:
                mode = mode or ("L" if image.mode in ("1", "L", "I;16") else "RGB")
                images.append(np.asarray(image.convert(mode)))
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}.") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"all images must have one size; {files[0]} has {images[0].shape[:2]} and {file} "
                f"{images[-1].shape[:2]}. Resize them first."
            )
    return np.stack(images)
