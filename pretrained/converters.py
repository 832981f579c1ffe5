"""Weights that others trained, for the networks that we have.

ResNets: the CIFAR ResNets of akamaster, and timm's and torchvision's. They name their tensors
`conv1`, `bn1`, `layer1.0.conv1`, …, and differ in the shortcut (`shortcut.0` or `downsample.0`) and
in the last layer (`linear` or `fc`). What the network looks like is read off the names and shapes.
MobileNetV2 and EfficientNet-Lite: see `pretrained.mobilenet_weights`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pretrained import flax_tree, mobilenet_weights
from pretrained.preprocessing import IMAGENET, LITE, SYMMETRIC, Preprocessing
from pretrained.resnet import ResNet

_MODULES = (
    (r"conv1", "stem"),
    (r"bn1", "stem_bn"),
    (r"(?:linear|fc)", "head"),
    (r"layer(\d+)\.(\d+)\.((?:conv|bn)\d)", r"layer\1/block\2/\3"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.0", r"layer\1/block\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.1", r"layer\1/block\2/shortcut_bn"),
)


class Converted(NamedTuple):
    """A network with its weights.

    Attributes:
      model: the module.
      variables: its variables.
      preprocess: what it was trained with.
    """

    model: Any
    variables: Any
    preprocess: Preprocessing


def load(source: str) -> Converted:
    """Reads a network's weights and tells which network it is.

    Args:
      source: as of `read_tensors`. A name with `tf_` in it, as timm has them, is that of a network
        of TensorFlow, which pads otherwise.

    Raises:
      ImportError: as of `read_tensors`.
      ValueError: as of `read_tensors`; or tensors of no network that we have.
    """
    tensors = read_tensors(source)
    try:
        return _convert(tensors, is_from_tensorflow="tf_" in source.rpartition("/")[2])
    except (LookupError, TypeError, ValueError) as error:
        reason = (
            str(error) if isinstance(error, ValueError) else f"shapes of another kind ({error})"
        )
        raise ValueError(f"{source} holds no weights of a network known here: {reason}") from error


def _convert(tensors: Mapping[str, np.ndarray], is_from_tensorflow: bool) -> Converted:
    if not mobilenet_weights.is_mobilenet(tensors):
        return Converted(*convert_resnet(tensors), IMAGENET)
    model, variables = mobilenet_weights.convert_mobilenet(tensors, is_from_tensorflow)
    if "params/stem/kernel" in tensors:
        return Converted(model, variables, LITE)
    return Converted(model, variables, SYMMETRIC if is_from_tensorflow else IMAGENET)


def read_tensors(source: str) -> dict[str, np.ndarray]:
    """Reads tensors from a safetensors file, local or on the Hugging Face hub.

    Args:
      source: a path ending in `.safetensors`, or `hf-hub:owner/name`, whose `model.safetensors` is
        downloaded.

    Raises:
      ImportError: a hub name without the package huggingface_hub.
      ValueError: no such file, or not a safetensors file.
    """
    path = Path(source)
    if source.startswith("hf-hub:"):
        try:
            from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"{source!r} needs huggingface_hub: pip install huggingface_hub, or download the "
                "file and pass its path."
            ) from error
        path = Path(hf_hub_download(source.removeprefix("hf-hub:"), "model.safetensors"))
    if not path.is_file():
        raise ValueError(f"`source` must be a safetensors file; there is none at {source!r}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`source` must be a safetensors file; {source!r}: {error}.") from error


def convert_resnet(tensors: Mapping[str, np.ndarray]) -> tuple[ResNet, Any]:
    """Converts PyTorch weights of a ResNet.

    Args:
      tensors: by PyTorch name: kernels OIHW, the last layer's [classes, features].

    Returns:
      The module and its variables.

    Raises:
      ValueError: tensors are missing, unknown, or of shapes that make no ResNet of ours.
    """
    converted = {}
    for name, tensor in tensors.items():
        if not name.endswith("num_batches_tracked"):
            converted[_path(name)] = flax_tree.in_flax_layout(tensor)
    model = _describe(tensors)
    channels = converted["params/stem/kernel"].shape[2]
    return model, flax_tree.variables_of(model, converted, channels)


def _path(name: str) -> str:
    """The place of a PyTorch tensor among our variables."""
    module, _, leaf = name.rpartition(".")
    for pattern, replacement in _MODULES:
        if re.fullmatch(pattern, module):
            path = re.sub(pattern, replacement, module)
            return flax_tree.variable(path, leaf)
    raise ValueError(f"`tensors` must be those of a ResNet; {name!r} is none of its names.")


def _describe(tensors: Mapping[str, np.ndarray]) -> ResNet:
    """Reads the module's fields off the names and shapes."""
    blocks = {match.groups() for name in tensors if (match := re.match(r"layer(\d+)\.(\d+)", name))}
    heads = [tensors[name] for name in ("linear.weight", "fc.weight") if name in tensors]
    if not blocks or not heads or "conv1.weight" not in tensors:
        raise ValueError(
            "`tensors` must be those of a ResNet: conv1.weight, layer1.0.conv1.weight, … and "
            f"linear.weight or fc.weight; got {', '.join(sorted(tensors)[:5])}, …."
        )
    stages = sorted({int(stage) for stage, _ in blocks})
    projections = [name for name in tensors if re.search(r"\.(shortcut|downsample)\.0", name)]
    return ResNet(
        stage_sizes=tuple(sum(int(s) == stage for s, _ in blocks) for stage in stages),
        stage_filters=tuple(len(tensors[f"layer{stage}.0.conv1.weight"]) for stage in stages),
        bottleneck=any(name.endswith("conv3.weight") for name in tensors),
        shortcut="projection" if projections else "pad",
        large_stem=tensors["conv1.weight"].shape[2] == 7,
        num_classes=len(heads[0]),
    )
