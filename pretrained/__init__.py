"""Reference models with their weights, datasets and training recipes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrained import cards, converters, own_models
from pretrained.models import build
from pretrained.preprocessing import Preprocessing

FOLDER = Path(__file__).parent


class Pretrained(NamedTuple):
    """A trained network, ready for inference.

    Attributes:
      name: of the model.
      apply_fn: a pure function of (params, float32[N, H, W, C]) that returns logits float32[N, K].
      params: the Flax variables.
      preprocess: maps uint8[N, H, W, C] to the network's input.
      dataset: the dataset it was trained on, see `datasets.load`; "" where nothing says so.
      card: how it was trained and how well it does.
    """

    name: str
    apply_fn: Callable[..., Any]
    params: Any
    preprocess: Callable[[Any], Any]
    dataset: str
    card: Mapping[str, Any]


def names() -> tuple[str, ...]:
    """The names of the models whose weights are here."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/card.json")))


def load(name: str) -> Pretrained:
    """Loads a model with its weights.

    Args:
      name: one of `names()`; or weights of a ResNet, a MobileNetV2 or an EfficientNet-Lite (see
        `converters`): the path of a safetensors file, or `hf-hub:owner/name`. These have CIFAR-10
        as their dataset where they have ten classes, else ImageNet. Or `package.module:function`,
        a function that makes a network, see `own_models`.

    Raises:
      ValueError: if there is no such model, or its weights are not the ones of its card.
    """
    if name.endswith(".safetensors") or name.startswith("hf-hub:"):
        model, params, preprocess = converters.load(name)
        dataset = "cifar10" if model.num_classes == 10 else "imagenet2012"
        return Pretrained(name, model.apply, params, preprocess, dataset, {})
    if own_models.is_own(name):
        return Pretrained(name, *own_models.load(name), "", {})
    if name not in names():
        raise ValueError(
            f"`name` must be one of {', '.join(names())}, the path of a safetensors file with "
            "weights of a ResNet, a MobileNetV2 or an EfficientNet-Lite, or "
            f"package.module:function, which returns (apply_fn, params); got {name!r}."
        )
    params, card = cards.read(FOLDER / name)
    try:
        preprocess = Preprocessing(
            card["preprocessing"]["scale"],
            *(tuple(card["preprocessing"][field]) for field in ("mean", "std")),
        )
        model = build(card["architecture"])
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{FOLDER / name / cards.CARD} is damaged: {error!r}. Fetch it again."
        ) from error
    return Pretrained(name, model.apply, params, preprocess, card["dataset"], card)
