"""What the commands find instead of real models and datasets."""

import numpy as np
import pytest
from cli.tiny import Model, apply_fn, make_params

import pretrained
from pretrained import datasets


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """A model `tiny` of random weights, and for any dataset 40 training and 300 test images."""
    rng = np.random.default_rng(0)
    sizes = {"train": 40, "test": 300}
    images = {split: rng.integers(0, 255, (n, 4, 4, 1), np.uint8) for split, n in sizes.items()}
    tiny = Model("tiny", apply_fn, make_params(), lambda x: np.float32(x) / 255, "noise")
    models = {"tiny": tiny}
    load_model, load_dataset = pretrained.load, datasets.load

    def load(name: str, split: str) -> datasets.Dataset:
        if name != "noise":
            return load_dataset(name, split)
        x = tiny.preprocess(images[split])
        labels = np.array(apply_fn(tiny.params, x).argmax(-1), np.int32)
        labels[: len(labels) // 4] = 10  # a quarter is wrong
        return datasets.Dataset(images[split], labels, name)

    monkeypatch.setattr(pretrained, "load", lambda name: models.get(name) or load_model(name))
    monkeypatch.setattr(datasets, "load", load)
    return models
