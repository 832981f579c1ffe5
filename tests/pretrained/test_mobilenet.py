"""Converted MobileNets give the logits of a plain NumPy reading of the same tensors."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import pretrained
from pretrained import mobilenet_weights

STEM, HEAD, CLASSES = 6, 12, 5


class Block(NamedTuple):
    """Stage and place in it, channels in, in the middle and out, kernel, stride."""

    stage: int
    place: int
    inputs: int
    expanded: int
    outputs: int
    size: int
    stride: int


BLOCKS = (
    Block(0, 0, 6, 6, 4, 3, 1),
    Block(1, 0, 4, 8, 5, 3, 2),
    Block(1, 1, 5, 10, 5, 3, 1),
    Block(2, 0, 5, 10, 6, 5, 2),
)
# By family: the names of stem and head with their batch norms, of the classifier, and of the
# convolutions and batch norms of a block that has an expansion, and of one that has none.
TIMM = (
    ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
    ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"),
    ("conv_dw", "bn1", "conv_pw", "bn2"),
)
TORCHVISION = (
    ("features.0.0", "features.0.1", "features.5.0", "features.5.1", "classifier.1"),
    ("conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", "conv.2", "conv.3"),
    ("conv.0.0", "conv.0.1", "conv.1", "conv.2"),
)
FAMILIES = {"timm": TIMM, "torchvision": TORCHVISION}


def modules(family: str, index: int, block: Block) -> list[tuple[str, str]]:
    """The pairs of convolution and batch norm of a block, in order."""
    prefix = f"blocks.{block.stage}.{block.place}" if family == "timm" else f"features.{index + 1}"
    names = [f"{prefix}.{n}" for n in FAMILIES[family][1 if block.stage else 2]]
    return list(zip(names[::2], names[1::2], strict=True))


def make_tensors(family: str) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of PyTorch's state dict."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}

    def conv(pair: tuple[str, str], features: int, channels: int, size: int):
        name, norm = pair
        std = (2 / (channels * size * size)) ** 0.5
        tensors[f"{name}.weight"] = rng.normal(0, std, (features, channels, size, size))
        tensors[f"{norm}.weight"] = rng.uniform(0.5, 1.5, features)
        tensors[f"{norm}.bias"] = rng.normal(0, 0.2, features)
        tensors[f"{norm}.running_mean"] = rng.normal(0, 0.2, features)
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 2, features)
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    stem, stem_norm, head, head_norm, classifier = FAMILIES[family][0]
    conv((stem, stem_norm), STEM, 3, 3)
    for index, block in enumerate(BLOCKS):
        *expand, depthwise, project = modules(family, index, block)
        for pair in expand:
            conv(pair, block.expanded, block.inputs, 1)
        conv(depthwise, block.expanded, 1, block.size)
        conv(project, block.outputs, block.expanded, 1)
    conv((head, head_norm), HEAD, BLOCKS[-1].outputs, 1)
    tensors[f"{classifier}.weight"] = rng.normal(size=(CLASSES, HEAD))
    tensors[f"{classifier}.bias"] = rng.normal(size=CLASSES)
    return {
        name: tensor.astype(np.int64 if "tracked" in name else np.float32)
        for name, tensor in tensors.items()
    }


def reference_logits(
    family: str, tensors: dict[str, np.ndarray], x: np.ndarray, is_same: bool
) -> np.ndarray:
    """The network as its source has it, in float64 on float[N, C, H, W]."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    epsilon = 1e-3 if is_same else 1e-5

    def padding(length: int, size: int, stride: int) -> tuple[int, int]:
        if not is_same:
            return size // 2, size // 2
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        return total // 2, total - total // 2

    def conv(x: np.ndarray, pair: tuple[str, str], stride: int = 1) -> np.ndarray:
        kernel, norm = tensors[f"{pair[0]}.weight"], pair[1]
        size = kernel.shape[2]
        ends = [padding(length, size, stride) for length in x.shape[2:]]
        x = np.pad(x, ((0, 0), (0, 0), *ends))
        views = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
        views = views[:, :, ::stride, ::stride]
        if kernel.shape[1] == 1:
            y = np.einsum("nchwij,cij->nchw", views, kernel[:, 0])
        else:
            y = np.einsum("nchwij,ocij->nohw", views, kernel)
        scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + epsilon)
        shift = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
        return y * scale[:, None, None] + shift[:, None, None]

    def relu6(x: np.ndarray) -> np.ndarray:
        return np.clip(x, 0, 6)

    stem, stem_norm, head, head_norm, classifier = FAMILIES[family][0]
    x = relu6(conv(x, (stem, stem_norm), 2))
    for index, block in enumerate(BLOCKS):
        *expand, depthwise, project = modules(family, index, block)
        y = x
        for pair in expand:
            y = relu6(conv(y, pair))
        y = conv(relu6(conv(y, depthwise, block.stride)), project)
        x = x + y if x.shape == y.shape else y
    x = relu6(conv(x, (head, head_norm)))
    return x.mean((2, 3)) @ tensors[f"{classifier}.weight"].T + tensors[f"{classifier}.bias"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("timm", "mobilenetv2.safetensors"),
        ("timm", "tf_efficientnet_lite0.safetensors"),
        ("torchvision", "mobilenet_v2.safetensors"),
    ],
)
def test_converted_logits_are_those_of_the_source(family: str, name: str, tmp_path: pathlib.Path):
    tensors = make_tensors(family)
    save_file(tensors, tmp_path / name)
    model = pretrained.load(str(tmp_path / name))
    x = np.random.default_rng(1).normal(size=(2, 38, 38, 3)).astype(np.float32)
    logits = jax.jit(model.apply_fn)(model.params, x)
    is_same = name.startswith("tf_")
    expected = reference_logits(family, tensors, x.transpose(0, 3, 1, 2), is_same)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_tree_of_leaves_is_read(tmp_path: pathlib.Path):
    model, variables = mobilenet_weights.convert_mobilenet(make_tensors("timm"), True)
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    file = tmp_path / "lite.safetensors"
    save_file(leaves, file)
    loaded = pretrained.load(str(file))
    x = loaded.preprocess(np.full((1, 32, 32, 3), 255, np.uint8))
    np.testing.assert_array_equal(x, np.ones((1, 32, 32, 3)))
    np.testing.assert_array_equal(loaded.apply_fn(loaded.params, x), model.apply(variables, x))


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("blocks.2.0.conv_dw.weight", "; blocks.2.0 holds bn1, bn2, bn3, conv_pw, conv_pwl"),
        ("blocks.1.1.bn2.bias", "at 'params/block2/bn1/bias' expected .10,., got nothing"),
        ("classifier.weight", "nothing is its 'fc'"),
    ],
)
def test_a_missing_tensor_is_named(gone: str, reason: str):
    tensors = make_tensors("timm")
    del tensors[gone]
    with pytest.raises(ValueError, match=reason):
        mobilenet_weights.convert_mobilenet(tensors)


def test_an_extra_tensor_is_named():
    tensors = make_tensors("timm") | {"blocks.1.0.se.weight": np.zeros((3, 3), np.float32)}
    with pytest.raises(ValueError, match="; blocks.1.0 holds bn1, .*, se"):
        mobilenet_weights.convert_mobilenet(tensors)
