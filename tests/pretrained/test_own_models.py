"""A network that a function of the user's makes."""

from pathlib import Path

import numpy as np
import pytest

import pretrained

MODULE = """
import numpy as np

def make():
    return (lambda params, x: x @ params["w"]), {"w": np.eye(2, dtype=np.float32)}

def with_preprocess():
    return *make(), lambda images: images / np.float32(100)

def number():
    return 3

def network():
    return make()[0], {}, None, "more"

constant = 7
"""
WRONG = {
    "own_network:number": r"must return \(apply_fn, params\) or .*; it returned int",
    "own_network:network": r"it returned \['function', 'dict', 'NoneType', 'str'\]",
    "own_network:constant": "own_network has no function 'constant'",
    "own_network:missing": "own_network has no function 'missing'",
    "no_such_module:make": "No module named 'no_such_module'. The current folder and",
    "own_network": "or package.module:function, which returns",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_a_function_makes_a_network():
    model = pretrained.load("own_network:make")
    pixels = np.full((1, 1, 1, 2), 51, np.uint8)
    np.testing.assert_allclose(model.preprocess(pixels), np.full((1, 1, 1, 2), 0.2, np.float32))
    assert model.apply_fn(model.params, np.ones((3, 2), np.float32)).shape == (3, 2)
    assert (model.name, model.dataset) == ("own_network:make", "")
    own = pretrained.load("own_network:with_preprocess")
    np.testing.assert_allclose(own.preprocess(pixels), np.full((1, 1, 1, 2), 0.51, np.float32))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str):
    with pytest.raises(ValueError, match=WRONG[name]):
        pretrained.load(name)
