"""Datasets: the fixed split of the digits, and a tiny TFDS dataset read without TensorFlow."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from pretrained import datasets

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
STORED = (3, 0, 5, 1, 4, 2)  # the order of the records in the file; ids give the one above


def features_json(**features: dict) -> str:
    package = "tensorflow_datasets.core.features"
    classes = {
        "image": f"{package}.image_feature.Image",
        "label": f"{package}.class_label_feature.ClassLabel",
        "id": f"{package}.text_feature.Text",
    }
    kinds = {"image": "image", "label": "classLabel", "id": "text"}
    entries = {
        name: {"pythonClassName": classes[name], kinds[name]: fields}
        for name, fields in features.items()
    }
    return json.dumps(
        {
            "pythonClassName": f"{package}.features_dict.FeaturesDict",
            "featuresDict": {"features": entries},
        }
    )


@pytest.fixture
def data_dir(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A TFDS folder with the dataset `tiny`, as array_record, and a cache folder of its own."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    monkeypatch.delenv("QJAX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tfds" / "tiny" / "1.2.3"
    folder.mkdir(parents=True)
    shape = {"dimensions": ["5", "4", "3"]}
    (folder / "features.json").write_text(
        features_json(image={"dtype": "uint8", "shape": shape}, label={"numClasses": "10"}, id={})
    )
    info = {
        "name": "tiny",
        "version": "1.2.3",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": "test",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1000",
                "shardLengths": [str(len(STORED))],
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    writer = ArrayRecordWriter(
        str(folder / "tiny-test.array_record-00000-of-00001"), "group_size:1"
    )
    for i in STORED:
        example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
        png = io.BytesIO()
        Image.fromarray(PIXELS[i]).save(png, "PNG")
        example.features.feature["image"].bytes_list.value.append(png.getvalue())
        example.features.feature["label"].int64_list.value.append(9 - i)
        example.features.feature["id"].bytes_list.value.append(f"test_{i:05d}".encode())
        writer.write(example.SerializeToString())
    writer.close()
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
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test'.*'validation'"):
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
