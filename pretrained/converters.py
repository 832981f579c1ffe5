"""PyTorch weights for our ResNets: the CIFAR ResNets of akamaster, and timm's and torchvision's.

Both name their tensors `conv1`, `bn1`, `layer1.0.conv1`, …; they differ in the shortcut
(`shortcut.0` or `downsample.0`) and in the last layer (`linear` or `fc`). What the network looks
like is read off the names and shapes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pretrained.resnet import ResNet

_MODULES = (
    (r"conv1", "stem"),
    (r"bn1", "stem_bn"),
    (r"(?:linear|fc)", "head"),
    (r"layer(\d+)\.(\d+)\.((?:conv|bn)\d)", r"layer\1/block\2/\3"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.0", r"layer\1/block\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.1", r"layer\1/block\2/shortcut_bn"),
)
_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def read_torch(source: str) -> dict[str, np.ndarray]:
    """Reads PyTorch tensors from a safetensors file, local or on the Hugging Face hub.

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
            converted[_path(name)] = _in_flax_layout(tensor)
    model = _describe(tensors)
    image = jax.ShapeDtypeStruct((1, 64, 64, converted["params/stem/kernel"].shape[2]), jnp.float32)
    expected: Any = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image), sep="/")
    shapes = {path: tensor.shape for path, tensor in converted.items()}
    wrong = {path for path in shapes.keys() | expected if not _agrees(path, shapes, expected)}
    if wrong:
        path = min(wrong)
        raise ValueError(
            f"`tensors` must hold the weights of {model}; at {path!r} expected "
            f"{expected[path].shape if path in expected else 'nothing'}, got "
            f"{shapes.get(path, 'nothing')}."
        )
    return model, unflatten_dict(converted, sep="/")


def _agrees(path: str, shapes: Mapping[str, tuple], expected: Mapping[str, Any]) -> bool:
    return path in shapes and path in expected and shapes[path] == expected[path].shape


def _path(name: str) -> str:
    """The place of a PyTorch tensor among our variables."""
    module, _, leaf = name.rpartition(".")
    for pattern, replacement in _MODULES:
        if re.fullmatch(pattern, module):
            path = re.sub(pattern, replacement, module)
            if leaf in _STATISTICS:
                return f"batch_stats/{path}/{_STATISTICS[leaf]}"
            kind = "scale" if path.rpartition("/")[2].count("bn") else "kernel"
            return f"params/{path}/{kind if leaf == 'weight' else leaf}"
    raise ValueError(f"`tensors` must be those of a ResNet; {name!r} is none of its names.")


def _in_flax_layout(tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim == 4:
        return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(tensor.T)


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
