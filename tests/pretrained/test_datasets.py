"""Datasets: the fixed split of the digits, and a tiny TFDS dataset read without TensorFlow."""

import pathlib

import numpy as np
import pytest
from tfds_layout import Record, features_json, write_dataset

from pretrained import datasets

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
STORED = (3, 0, 5, 1, 4, 2)  # the order of the records in the file; ids give the one above


@pytest.fixture
def data_dir(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A TFDS folder with the dataset `tiny`, as array_record, and a cache folder of its own."""
    monkeypatch.delenv("QJAX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = [Record(PIXELS[i], 9 - i, f"test_{i:05d}") for i in STORED]
    write_dataset(tmp_path / "tfds", "tiny", "1.2.3", {"test": records})
    return tmp_path / "tfds"


def test_digits_split_is_fixed_disjoint_and_stratified():
    train, test = (datasets.load("digits", split) for split in ("train", "test"))
    assert train.images.shape == (1297, 8, 8, 1) and test.images.shape == (500, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.images.max() == 16
    counts = np.bincount(test.labels)
    assert counts.min() >= 48 and counts.max() <= 51
    both = np.concatenate([train.images, test.images]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797
    # The checkpoint was trained on this very split.
    assert test.labels[:10].tolist() == [0, 1, 4, 5, 8, 5, 6, 5, 9, 9]


def test_digits_has_two_splits():
    with pytest.raises(
        ValueError, match=r"`split` must be one of \['train', 'test'\].*'validation'"
    ):
        datasets.load("digits", "validation")


def test_tfds_images_come_in_the_order_of_their_ids(data_dir: pathlib.Path):
    dataset = datasets.load("tiny", "test", data_dir)
    assert dataset.name == "tiny"
    assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.images, PIXELS)
    np.testing.assert_array_equal(dataset.labels, [9, 8, 7, 6, 5, 4])


def test_decoded_images_are_cached_whole(data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    first = datasets.load("tiny", "test", data_dir)
    files = sorted(datasets.cache_dir().rglob("*"))
    names = [file.name for file in files if file.is_file()]
    assert names == ["test_images.npy", "test_labels.npy"]
    monkeypatch.setattr(datasets, "_decode", lambda *_: pytest.fail("decoded again"))
    second = datasets.load("tiny", "test", data_dir)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_emnist_is_upright_whatever_the_cache_holds(data_dir: pathlib.Path):
    stored = PIXELS[..., :1].swapaxes(1, 2)
    records = [Record(image, label) for label, image in enumerate(stored)]
    write_dataset(data_dir, "emnist/digits", "3.1.0", {"test": records})
    for _ in range(2):  # decoded, then cached
        dataset = datasets.load("emnist/digits", "test", data_dir)
        np.testing.assert_array_equal(dataset.images, PIXELS[..., :1])
        np.testing.assert_array_equal(dataset.labels, range(6))
        assert dataset.images.flags.c_contiguous
    cached = datasets.cache_dir() / "datasets" / "emnist" / "digits" / "3.1.0" / "test_images.npy"
    np.testing.assert_array_equal(np.load(cached), stored)  # what older versions cached


@pytest.mark.parametrize(
    ("platform", "folder"),
    [
        ("linux", ".cache/qjax"),
        ("darwin", "Library/Caches/qjax"),
        ("win32", "AppData/Local/qjax"),
    ],
)
def test_the_cache_folder_is_where_the_platform_has_it(
    platform: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    for name in ("QJAX_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    monkeypatch.setattr("sys.platform", platform)
    assert datasets.cache_dir() == tmp_path / folder
    monkeypatch.setenv("LOCALAPPDATA" if platform == "win32" else "XDG_CACHE_HOME", "/set")
    expected = tmp_path / folder if platform == "darwin" else pathlib.Path("/set/qjax")
    assert datasets.cache_dir() == expected
    monkeypatch.setenv("QJAX_CACHE_DIR", "/own")
    assert datasets.cache_dir() == pathlib.Path("/own")


def test_loading_needs_no_cache(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    dataset = datasets.load("tiny", "test", data_dir, cache=False)
    np.testing.assert_array_equal(dataset.images, PIXELS)
    assert not datasets.cache_dir().exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot be a folder
    np.testing.assert_array_equal(datasets.load("tiny", "test", data_dir).images, PIXELS)


def test_data_dir_may_come_from_the_environment(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    np.testing.assert_array_equal(datasets.load("tiny", "test").images, PIXELS)


def test_unknown_split_is_an_error_that_lists_the_splits(data_dir: pathlib.Path):
    with pytest.raises(ValueError, match=r"`split` must be one of \['test'\].*'train'"):
        datasets.load("tiny", "train", data_dir)


def test_dataset_without_labels_is_an_error(data_dir: pathlib.Path):
    shape = {"dimensions": ["5", "4", "3"]}
    features = features_json(image={"dtype": "uint8", "shape": shape})
    (data_dir / "tiny" / "1.2.3" / "features.json").write_text(features)
    with pytest.raises(ValueError, match=r"`image` and `label`; 'tiny' has \['image'\]"):
        datasets.load("tiny", "test", data_dir)


def test_unknown_name_is_an_error(data_dir: pathlib.Path):
    with pytest.raises(ValueError, match="`name` must be 'digits' or a TFDS dataset.*'nonsense'"):
        datasets.load("nonsense", "test", data_dir)


def test_unprepared_dataset_says_what_to_run(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"TensorFlow is missing(.|\n)*pip install 'qjax\[all,pre"
    ):
        datasets.load("mnist", "test", data_dir)


def test_failing_preparation_says_what_to_run(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    import tensorflow_datasets as tfds

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(RuntimeError, match=r"no network(.|\n)*tfds.data_source\('mnist'"):
        datasets.load("mnist", "test", data_dir)


def test_calibration_draw_is_seeded_and_without_repetition():
    images = np.arange(100).reshape(100, 1)
    draw = datasets.calibration_draw(images, 60, seed=1)
    np.testing.assert_array_equal(draw, datasets.calibration_draw(images, 60, seed=1))
    assert len(np.unique(draw)) == 60
    assert (draw != datasets.calibration_draw(images, 60, seed=2)).any()


@pytest.mark.parametrize("size", [0, 11])
def test_calibration_draw_of_impossible_size_is_an_error(size: int):
    with pytest.raises(ValueError, match=f"`size` must be between 1 and 10.*got {size}"):
        datasets.calibration_draw(np.zeros((10, 1)), size, seed=0)


DAMAGES = {
    "dataset_info.json": ["", "{", "{}"],
    "features.json": ["{"],
    "tiny-test.array_record-00000-of-00001": ["", "cut off"],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n in DAMAGES for t in DAMAGES[n]])
def test_damaged_files_are_named(data_dir: pathlib.Path, name: str, text: str):
    (data_dir / "tiny" / "1.2.3" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"'tiny' .*{data_dir}.*prepare it again") as caught:
        datasets.load("tiny", "test", data_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny:9.9.9", "mnist:9.9.9", "no//such:::x", "../x"])
def test_names_that_are_none(data_dir: pathlib.Path, name: str):
    with pytest.raises(ValueError, match=f"`name` must be 'digits' or a TFDS .*{name}") as caught:
        datasets.load(name, "test", data_dir)
    assert "\n" not in str(caught.value)


def test_digits_are_kept_too(data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    decoded = datasets.load("digits", "test")
    monkeypatch.setattr(datasets, "_split_digits", None)
    kept = datasets.load("digits", "test")
    np.testing.assert_array_equal(kept.images, decoded.images)
    np.testing.assert_array_equal(kept.labels, decoded.labels)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"PK", None])
def test_a_damaged_cache_is_rebuilt(data_dir: pathlib.Path, damage: bytes | None):
    datasets.load("tiny", "test", data_dir)
    [file] = datasets.cache_dir().rglob("test_images.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    np.testing.assert_array_equal(datasets.load("tiny", "test", data_dir).images, PIXELS)
    assert file.read_bytes() == whole
