"""Weights of MobileNetV2 and EfficientNet-Lite: timm's, torchvision's, and trees of Flax leaves.

timm names its tensors `conv_stem`, `blocks.1.0.conv_dw`, …, torchvision `features.0.0`,
`features.2.conv.1.0`, …; the leaves of a tree are named by their paths among our variables. What
the network looks like is read off the shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrained import flax_tree
from pretrained.mobilenet import STRIDES, Block, MobileNet

# The convolutions of a block, and where their batch norms stand.
_EXPANDED = ("expand", "bn0", "depthwise", "bn1", "project", "bn2")
_PLAIN = _EXPANDED[2:]

_TIMM_BLOCKS: tuple[dict[str, str], ...] = (
    dict(zip(("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), _EXPANDED, strict=True)),
    dict(zip(("conv_dw", "bn1", "conv_pw", "bn2"), _PLAIN, strict=True)),
)
_TIMM_ENDS = {"conv_stem": "stem", "bn1": "bn0", "conv_head": "head", "bn2": "bn1"}
_TORCHVISION_BLOCKS: tuple[dict[str, str], ...] = (
    dict(zip(("0.0", "0.1", "1.0", "1.1", "2", "3"), _EXPANDED, strict=True)),
    dict(zip(("0.0", "0.1", "1", "2"), _PLAIN, strict=True)),
)


def is_mobilenet(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the names are those of such a network."""
    return bool({"conv_stem.weight", "features.0.0.weight", "params/stem/kernel"} & set(tensors))


def convert_mobilenet(
    tensors: Mapping[str, np.ndarray], same_padding: bool = False
) -> tuple[MobileNet, Any]:
    """Converts weights of a MobileNetV2 or an EfficientNet-Lite.

    Args:
      tensors: by name; a tree of Flax leaves is that of a network of TensorFlow.
      same_padding: whether the network comes from TensorFlow, with its padding and its epsilon of
        batch norm; names and shapes do not tell.

    Returns:
      The module and its variables.

    Raises:
      ValueError: tensors are missing, unknown, or of shapes that make no such network.
    """
    if "params/stem/kernel" in tensors:
        leaves, same_padding = dict(tensors), True
    else:
        tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
        modules = _timm_modules(tensors) if "conv_stem.weight" in tensors else _torchvision(tensors)
        leaves = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if module not in modules:
                raise ValueError(f"`tensors` must be those of a MobileNet; {name!r} is none of it.")
            leaves[flax_tree.variable(modules[module], leaf)] = flax_tree.in_flax_layout(tensor)
    model = _describe(leaves, same_padding)
    return model, flax_tree.variables_of(model, leaves, leaves["params/stem/kernel"].shape[2])


def _timm_modules(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Our paths by the names of timm's modules."""
    found = re.compile(r"(blocks\.(\d+)\.(\d+))\.([^.]+)\.weight")
    return _modules(tensors, found, _TIMM_BLOCKS) | _TIMM_ENDS | {"classifier": "fc"}


def _torchvision(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Our paths by the names of torchvision's modules."""
    found = re.compile(r"(features\.(\d+)()\.conv)\.(.+)\.weight")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("features."))
    ends = {"0.0": "stem", "0.1": "bn0", f"{last}.0": "head", f"{last}.1": "bn1"}
    ends = {f"features.{name}": path for name, path in ends.items()}
    return _modules(tensors, found, _TORCHVISION_BLOCKS) | ends | {"classifier.1": "fc"}


def _modules(
    tensors: Mapping[str, np.ndarray], pattern: re.Pattern[str], kinds: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Our paths of the modules in blocks, which are numbered in their order.

    Args:
      tensors: by name.
      pattern: of a weight: the block, two numbers that order it, the module in it.
      kinds: our names of the modules in a block, for each kind of block.
    """
    blocks: dict[str, list[str]] = {}
    matches = filter(None, map(pattern.fullmatch, tensors))
    for match in sorted(matches, key=lambda m: (int(m[2]), int(m[3] or 0))):
        blocks.setdefault(match[1], []).append(match[4])
    paths = {}
    for i, (block, modules) in enumerate(blocks.items()):
        kind = next((kind for kind in kinds if kind.keys() == set(modules)), None)
        if kind is None:
            raise ValueError(
                f"`tensors` must be those of a MobileNet, whose blocks hold "
                f"{' or '.join(', '.join(kind) for kind in kinds)}; {block} holds "
                f"{', '.join(sorted(modules))}."
            )
        paths |= {f"{block}.{module}": f"block{i}/{path}" for module, path in kind.items()}
    return paths


def _describe(leaves: Mapping[str, np.ndarray], same_padding: bool) -> MobileNet:
    """Reads the module's fields off the shapes; a stage begins where the features change."""

    def shape(path: str) -> tuple[int, ...]:
        leaf = leaves.get(f"params/{path}/kernel")
        if leaf is None:
            raise ValueError(f"`tensors` must be those of a MobileNet; nothing is its {path!r}.")
        return leaf.shape

    blocks: list[Block] = []
    stage = -1
    while f"params/block{len(blocks)}/project/kernel" in leaves:
        name = f"block{len(blocks)}"
        size, _, _, expanded = shape(f"{name}/depthwise")
        features = shape(f"{name}/project")[3]
        begins = not blocks or features != blocks[-1].features
        stage += begins
        if stage == len(STRIDES):
            raise ValueError(f"`tensors` must be those of a MobileNet of {len(STRIDES)} stages.")
        blocks.append(Block(expanded, size, STRIDES[stage] if begins else 1, features))
    return MobileNet(
        stem=shape("stem")[3],
        blocks=tuple(blocks),
        head=shape("head")[3],
        num_classes=shape("fc")[1],
        same_padding=same_padding,
        epsilon=1e-3 if same_padding else 1e-5,
    )
