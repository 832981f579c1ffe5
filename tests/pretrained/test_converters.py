"""Converted PyTorch ResNets give the logits of a plain NumPy reading of the same tensors."""

import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import pretrained
from pretrained import converters


class Case(NamedTuple):
    """A network: blocks and channels by stage, and how its PyTorch source names and shapes it."""

    name: str
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    bottleneck: bool = False
    large_stem: bool = False
    shortcut: str = "downsample"
    head: str = "fc"


CASES = (
    Case("timm resnet18", (2, 2, 2, 2), (8, 16, 24, 32), large_stem=True),
    Case("timm resnet34", (3, 4, 6, 3), (4, 8, 8, 12), large_stem=True),
    Case("timm resnet50", (3, 4, 6, 3), (4, 4, 8, 8), bottleneck=True, large_stem=True),
    Case("akamaster resnet20, option A", (3, 3, 3), (16, 32, 64), shortcut="", head="linear"),
    Case("akamaster resnet8, option B", (1, 1, 1), (4, 8, 16), shortcut="shortcut", head="linear"),
)


def make_tensors(case: Case) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of PyTorch's state dict."""
    rng = np.random.default_rng(0)
    tensors = {}

    def conv(name: str, features: int, channels: int, size: int):
        std = (2 / (channels * size * size)) ** 0.5
        tensors[f"{name}.weight"] = rng.normal(0, std, (features, channels, size, size))

    def norm(name: str, features: int):
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, features)
        tensors[f"{name}.bias"] = rng.normal(0, 0.2, features)
        tensors[f"{name}.running_mean"] = rng.normal(0, 0.2, features)
        tensors[f"{name}.running_var"] = rng.uniform(0.5, 2, features)
        tensors[f"{name}.num_batches_tracked"] = np.array(7)

    width = case.channels[0]
    conv("conv1", width, 3, 7 if case.large_stem else 3)
    norm("bn1", width)
    for stage, (blocks, inner) in enumerate(zip(case.blocks, case.channels, strict=True), 1):
        out = 4 * inner if case.bottleneck else inner
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            sizes = (1, 3, 1) if case.bottleneck else (3, 3)
            ends = [width, *[inner] * (len(sizes) - 1), out]
            for i, size in enumerate(sizes, 1):
                conv(f"{prefix}.conv{i}", ends[i], ends[i - 1], size)
                norm(f"{prefix}.bn{i}", ends[i])
            if case.shortcut and (width != out or (stage > 1 and block == 0)):
                conv(f"{prefix}.{case.shortcut}.0", out, width, 1)
                norm(f"{prefix}.{case.shortcut}.1", out)
            width = out
    tensors[f"{case.head}.weight"] = rng.normal(0, 0.1, (10, width))
    tensors[f"{case.head}.bias"] = rng.normal(0, 0.1, 10)
    return {
        name: tensor.astype(np.int64 if "tracked" in name else np.float32)
        for name, tensor in tensors.items()
    }


def reference_logits(case: Case, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The network as its PyTorch source has it, in float64 on float[N, C, H, W]."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def windows(x: np.ndarray, size: int, stride: int, fill: float) -> np.ndarray:
        p = size // 2
        x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)), constant_values=fill)
        views = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
        return views[:, :, ::stride, ::stride]

    def conv_norm(x: np.ndarray, conv: str, norm: str, stride: int) -> np.ndarray:
        kernel = tensors[f"{conv}.weight"]
        y = np.tensordot(windows(x, kernel.shape[2], stride, 0), kernel, ((1, 4, 5), (1, 2, 3)))
        y = (y - tensors[f"{norm}.running_mean"]) / np.sqrt(tensors[f"{norm}.running_var"] + 1e-5)
        y = y * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"]
        return y.transpose(0, 3, 1, 2)

    x = np.maximum(conv_norm(x, "conv1", "bn1", 2 if case.large_stem else 1), 0)
    if case.large_stem:
        x = windows(x, 3, 2, -np.inf).max(axis=(4, 5))
    for stage, blocks in enumerate(case.blocks, 1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            strides = (1, stride, 1) if case.bottleneck else (stride, 1)
            y = x
            for i, step in enumerate(strides, 1):
                y = conv_norm(y, f"{prefix}.conv{i}", f"{prefix}.bn{i}", step)
                y = y if i == len(strides) else np.maximum(y, 0)
            if f"{prefix}.{case.shortcut}.0.weight" in tensors:
                shortcut = f"{prefix}.{case.shortcut}"
                x = conv_norm(x, f"{shortcut}.0", f"{shortcut}.1", stride)
            elif stride == 2:
                quarter = y.shape[1] // 4
                x = np.pad(x[:, :, ::2, ::2], ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
            x = np.maximum(x + y, 0)
    return x.mean(axis=(2, 3)) @ tensors[f"{case.head}.weight"].T + tensors[f"{case.head}.bias"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converted_logits_are_those_of_the_source(case: Case, tmp_path: pathlib.Path):
    tensors = make_tensors(case)
    save_file(tensors, tmp_path / "weights.safetensors")
    model = pretrained.load(str(tmp_path / "weights.safetensors"))
    x = np.random.default_rng(1).normal(size=(2, 45, 45, 3)).astype(np.float32)
    logits = jax.jit(model.apply_fn)(model.params, x)
    expected = reference_logits(case, tensors, x.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_missing_tensor_is_named():
    tensors = make_tensors(CASES[0])
    del tensors["layer2.1.bn2.bias"]
    with pytest.raises(ValueError, match="layer2/block1/bn2/bias' expected .16,., got nothing"):
        converters.convert_resnet(tensors)


def test_extra_tensor_is_named():
    tensors = make_tensors(CASES[0])
    tensors["layer2.1.attention.weight"] = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match="'layer2.1.attention.weight' is none of its names"):
        converters.convert_resnet(tensors)


def test_tensor_of_another_shape_is_named():
    tensors = make_tensors(CASES[0])
    tensors["layer3.0.conv2.weight"] = np.zeros((24, 24, 5, 5), np.float32)
    expected = r"layer3/block0/conv2/kernel' expected \(3, 3, 24, 24\), got \(5, 5, 24, 24\)"
    with pytest.raises(ValueError, match=expected):
        converters.convert_resnet(tensors)


def test_tensors_of_another_network_are_an_error():
    with pytest.raises(ValueError, match="`tensors` must be those of a ResNet"):
        converters.convert_resnet({"features.0.weight": np.zeros((8, 3, 3, 3), np.float32)})


def test_file_that_is_missing_or_no_safetensors_is_an_error(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="must be a safetensors file; there is none at"):
        pretrained.load(str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(ValueError, match="must be a safetensors file; .*text.safetensors"):
        pretrained.load(str(tmp_path / "text.safetensors"))


def test_hub_name_without_huggingface_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        pretrained.load("hf-hub:timm/resnet18.a1_in1k")


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_tensors_of_another_rank_name_their_file(tmp_path: pathlib.Path, name: str, rank: int):
    tensors = make_tensors(CASES[0])
    assert name in tensors
    file = tmp_path / "weights.safetensors"
    save_file(tensors | {name: np.zeros((1,) * rank, np.float32)}, file)
    with pytest.raises(ValueError, match=f"{file} holds no weights of a network"):
        pretrained.load(str(file))
