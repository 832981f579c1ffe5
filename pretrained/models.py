"""The small reference networks, and building any network from the description in its card."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from pretrained.resnet import ResNet
from pretrained.vit import VisionTransformer


class MLP(nn.Module):
    """A multilayer perceptron with relu: `fc1`, `fc2`, ..., `head`.

    Attributes:
      widths: units of each hidden layer.
      num_classes: logits per image.
    """

    widths: tuple[int, ...] = (256, 128)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps preprocessed images float[N, H, W, C] to logits float[N, num_classes]."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, start=1):
            x = nn.relu(nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.num_classes, name="head")(x)


class LeNet5(nn.Module):
    """LeNet-5 with relu and max-pooling and without biases: 61,470 parameters on 28x28 images.

    Attributes:
      num_classes: logits per image.
      conv_general_dilated: replaces `lax.conv_general_dilated` in both convolutions.

    References:
      LeCun et al., 1998, Gradient-based learning applied to document recognition, section II.B.
    """

    num_classes: int = 10
    conv_general_dilated: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps preprocessed images float[N, 28, 28, 1] to logits float[N, num_classes]."""
        del train
        conv = partial(
            nn.Conv,
            kernel_size=(5, 5),
            use_bias=False,
            conv_general_dilated=self.conv_general_dilated,
        )
        x = nn.relu(conv(6, padding=((2, 2), (2, 2)), name="conv1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(conv(16, padding="VALID", name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, use_bias=False, name="fc1")(x))
        x = nn.relu(nn.Dense(84, use_bias=False, name="fc2")(x))
        return nn.Dense(self.num_classes, use_bias=False, name="head")(x)


FAMILIES = {family.__name__: family for family in (ResNet, MLP, LeNet5, VisionTransformer)}


def describe(model: nn.Module) -> dict[str, Any]:
    """Returns the JSON-ready description of `model`: its family and every field that shapes it."""
    skipped = ("parent", "name", "conv_general_dilated")
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return {"family": type(model).__name__, **{k: v for k, v in fields.items() if k not in skipped}}


def build(description: Mapping[str, Any]) -> nn.Module:
    """Returns the module that `describe` described.

    Args:
      description: `family` and its fields, as read from a card; lists stand for tuples.

    Returns:
      The module.

    Raises:
      ValueError: if the family is unknown.
    """
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.items()
    }
    family = fields.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {sorted(FAMILIES)}, got {family!r}.")
    return FAMILIES[family](**fields)
