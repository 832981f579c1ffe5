"""Datasets as TFDS lays them out on disk, in array_record files, written without TensorFlow."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Record(NamedTuple):
    """An image uint8[H, W, C], its label, and its id where the dataset has ids."""

    image: np.ndarray
    label: int
    id: str | None = None


def features_json(**features: dict[str, Any]) -> str:
    """`features.json`: image={"dtype", "shape"}, label={"numClasses"}, id={}."""
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


def write_dataset(
    data_dir: pathlib.Path,
    name: str,
    version: str,
    splits: Mapping[str, Sequence[Record]],
    classes: int = 10,
) -> None:
    """Writes all splits of a dataset, `name` or `name/config`, each as one file."""
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    name, _, config = name.partition("/")
    first = next(iter(splits.values()))[0]
    shape = {"dimensions": [str(size) for size in first.image.shape]}
    features: dict[str, dict[str, Any]] = {
        "image": {"dtype": "uint8", "shape": shape},
        "label": {"numClasses": str(classes)},
    }
    (folder / "features.json").write_text(
        features_json(**features, **({} if first.id is None else {"id": {}}))
    )
    info = {
        "name": name,
        "version": version,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1000",
                "shardLengths": [str(len(records))],
            }
            for split, records in splits.items()
        ],
    }
    (folder / "dataset_info.json").write_text(
        json.dumps(info | ({"configName": config} if config else {}))
    )
    for split, records in splits.items():
        _write_records(folder / f"{name}-{split}.array_record-00000-of-00001", records)


def _write_records(file: pathlib.Path, records: Sequence[Record]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
        feature = example.features.feature
        png = io.BytesIO()
        Image.fromarray(record.image.squeeze()).save(png, "PNG")
        feature["image"].bytes_list.value.append(png.getvalue())
        feature["label"].int64_list.value.append(record.label)
        if record.id is not None:
            feature["id"].bytes_list.value.append(record.id.encode())
        writer.write(example.SerializeToString())
    writer.close()
