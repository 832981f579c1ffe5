"""Images in a folder by class, or in an `.npz` file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrained import datasets

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3), np.uint8)


def save(folder: Path, images: Any, ending: str = "png") -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.{ending}")


def test_a_folder_by_class(tmp_path: Path):
    save(tmp_path / "train" / "dog", PIXELS[:1])
    save(tmp_path / "train" / "cat", PIXELS[1:3])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    save(tmp_path / "val" / "cat", PIXELS[3:])
    found = datasets.load(str(tmp_path), "train")
    np.testing.assert_array_equal(found.images, PIXELS[[1, 2, 0]])
    assert found.labels.tolist() == [0, 0, 1] and found.labels.dtype == np.int32
    assert found.name == str(tmp_path)
    np.testing.assert_array_equal(datasets.load(str(tmp_path), "test").images, PIXELS[3:])


def test_folders_that_are_named_by_numbers_are_these_classes(tmp_path: Path):
    for label in ("0007", "0002", "0010"):
        save(tmp_path / "train" / label, PIXELS[:1])
    assert datasets.load(str(tmp_path), "train").labels.tolist() == [2, 7, 10]


def test_grey_images_have_one_channel(tmp_path: Path):
    save(tmp_path / "train" / "cat", PIXELS[..., 0])
    found = datasets.load(str(tmp_path), "train")
    np.testing.assert_array_equal(found.images, PIXELS[..., :1])


@pytest.mark.parametrize("channels", [slice(3), 0], ids=["color", "grey"])
def test_an_npz_file(channels: Any, tmp_path: Path):
    file = tmp_path / "images.npz"
    images = PIXELS[..., channels]
    labels = np.arange(6)[:, None]
    np.savez(file, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    found = datasets.load(str(file), "train")
    np.testing.assert_array_equal(found.images, images.reshape(6, 5, 4, -1))
    assert found.labels.tolist() == list(range(6))
    assert len(datasets.load(str(file), "test").images) == 2


def test_a_folder_that_holds_no_images_is_refused(tmp_path: Path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="train must hold a folder of images"):
        datasets.load(str(tmp_path), "train")
    with pytest.raises(ValueError, match="must hold a folder test or val with a folder for every"):
        datasets.load(str(tmp_path), "test")


def test_images_of_two_sizes_are_refused(tmp_path: Path):
    save(tmp_path / "train" / "cat", [PIXELS[0], PIXELS[1][:3]])
    with pytest.raises(ValueError, match=r"must have one size; .*0.png has \(5, 4\) and .*1.png"):
        datasets.load(str(tmp_path), "train")


def test_a_damaged_image_is_named(tmp_path: Path):
    save(tmp_path / "train" / "cat", PIXELS[:1])
    (tmp_path / "train" / "cat" / "9.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="9.png cannot be read as an image"):
        datasets.load(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": PIXELS}, "must hold x_train and y_train"),
        (
            {"x_train": np.float32(PIXELS), "y_train": np.arange(6)},
            r"must hold images uint8\[N, H, W, C\] and a label for each; got float32",
        ),
        ({"x_train": PIXELS, "y_train": np.arange(5)}, r"and labels \[5\]"),
        ({"x_train": PIXELS[:0], "y_train": np.arange(0)}, "holds no image of the split 'train'"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path):
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        datasets.load(str(tmp_path / "images.npz"), "train")


@pytest.mark.parametrize("content", [None, b"", b"PK not a zip"])
def test_a_file_that_is_none_is_named(content: bytes | None, tmp_path: Path):
    file = tmp_path / "images.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="images.npz is no .npz file with arrays"):
        datasets.load(str(file), "train")
