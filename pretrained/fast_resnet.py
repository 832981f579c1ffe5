"""The training pass of a `ResNet` with basic blocks, in the layout of `fast_convolution`."""

from typing import Any

import jax
from flax import linen as nn
from jax import lax

from pretrained.fast_convolution import convolve
from pretrained.resnet import BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM, ResNet, pad_shortcut


def supports(model: ResNet) -> bool:
    """Whether `apply` computes `model`: one with basic blocks and the small stem."""
    return not model.bottleneck and not model.large_stem


def apply(model: ResNet, variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    """Computes what `model.apply(variables, images, train=True, mutable=["batch_stats"])` does.

    Args:
      model: see `supports`.
      variables: `params` and `batch_stats`.
      images: float[N, H, W, C].

    Returns:
      Logits float[N, num_classes] and the updated `batch_stats`.
    """
    params, stats = variables["params"], variables["batch_stats"]
    new_stats = {}
    x = images.transpose(3, 1, 2, 0)
    x, new_stats["stem_bn"] = _conv_norm(x, params["stem"], params["stem_bn"], stats["stem_bn"], 1)
    x = nn.relu(x)
    for i, blocks in enumerate(model.stage_sizes):
        layer = f"layer{i + 1}"
        new_stats[layer] = {}
        for j in range(blocks):
            block = f"block{j}"
            stride = 2 if i > 0 and j == 0 else 1
            x, new_stats[layer][block] = _block(
                x, params[layer][block], stats[layer][block], stride
            )
    head = params["head"]
    return x.mean(axis=(1, 2)).T @ head["kernel"] + head["bias"][None], new_stats


def _block(x: jax.Array, params: Any, stats: Any, stride: int) -> tuple[jax.Array, Any]:
    """One basic block on float[C, H, W, N]; returns its output and updated statistics."""
    new_stats = {}
    y, new_stats["bn1"] = _conv_norm(x, params["conv1"], params["bn1"], stats["bn1"], stride)
    y, new_stats["bn2"] = _conv_norm(nn.relu(y), params["conv2"], params["bn2"], stats["bn2"], 1)
    if "shortcut_conv" in params:
        x, new_stats["shortcut_bn"] = _conv_norm(
            x, params["shortcut_conv"], params["shortcut_bn"], stats["shortcut_bn"], stride
        )
    elif x.shape != y.shape:
        x = pad_shortcut(x, stride, y.shape[0], axis=0)
    return nn.relu(x + y), new_stats


def _conv_norm(
    x: jax.Array, conv: Any, norm: Any, stats: Any, stride: int
) -> tuple[jax.Array, Any]:
    """A convolution and batch norm by the batch's statistics, which also move the running ones."""
    y = convolve(x, conv["kernel"], stride, conv["kernel"].shape[0] // 2)
    mean = y.mean(axis=(1, 2, 3))
    var = (y * y).mean(axis=(1, 2, 3)) - mean**2
    scale = norm["scale"] * lax.rsqrt(var + BATCH_NORM_EPSILON)
    bias = norm["bias"] - scale * mean
    new_stats = jax.tree.map(
        lambda old, new: BATCH_NORM_MOMENTUM * old + (1 - BATCH_NORM_MOMENTUM) * new,
        dict(stats),
        {"mean": mean, "var": var},
    )
    return scale.reshape(-1, 1, 1, 1) * y + bias.reshape(-1, 1, 1, 1), new_stats
