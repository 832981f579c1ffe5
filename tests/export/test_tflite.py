"""`to_tflite` without the package that writes; with it, see `tests/runtimes/test_litert.py`."""

import sys

import pytest
import small

import qjax


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(ImportError, match=r'litert-converter; .* `pip install "qjax\[runtimes\]"`'):
        qjax.to_tflite(small.quantized(), small.images(2))
