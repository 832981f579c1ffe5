"""The training recipes of the reference models, by name."""

import dataclasses

from flax import linen as nn

from pretrained.models import MLP, LeNet5
from pretrained.preprocessing import CIFAR10, DIGITS, MNIST, Preprocessing
from pretrained.resnet import resnet_cifar, resnet_imagenet
from pretrained.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what `training.train` computes.

    Attributes:
      name: of the recipe and of the folder its model goes to.
      dataset: see `datasets.load`.
      model: the untrained module.
      preprocessing: from pixels to network input.
      epochs: passes over the training split.
      batch_size: images per step.
      learning_rate: the peak, reached after `warmup`, held for `steady` and brought to 0 by half a
        cosine.
      warmup: fraction of the steps with a linearly rising learning rate.
      steady: fraction of the steps at the peak.
      momentum: of Nesterov's SGD.
      weight_decay: L2 on kernels; biases and batch norm are left alone.
      label_smoothing: mass moved from the label to the uniform distribution.
      average_decay: per step, of the moving average of the weights that is finally taken.
      shift: images are moved by up to this many pixels, mirrored at the border.
      flip: mirror half of the images, every image in every second epoch.
      sizes: (fraction, side) pairs: until this fraction of the steps, images shrink to this side.
      evaluate_every: epochs between two entries in the log.
      seed: of the weights, the order and the augmentation.
    """

    name: str
    dataset: str
    model: nn.Module
    preprocessing: Preprocessing
    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1
    warmup: float = 0.1
    steady: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    average_decay: float = 0.995
    shift: int = 0
    flip: bool = False
    sizes: tuple[tuple[float, int], ...] = ()
    evaluate_every: int = 1
    seed: int = 0


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="resnet20-digits",
            dataset="digits",
            model=resnet_cifar(20),
            preprocessing=DIGITS,
            epochs=40,
            batch_size=64,
            shift=1,
            label_smoothing=0.1,
            evaluate_every=10,
        ),
        Recipe(
            name="mlp-mnist",
            dataset="mnist",
            model=MLP(),
            preprocessing=MNIST,
            epochs=30,
            learning_rate=0.05,
            weight_decay=1e-4,
            shift=1,
        ),
        Recipe(
            name="lenet5-mnist",
            dataset="mnist",
            model=LeNet5(),
            preprocessing=MNIST,
            epochs=20,
            learning_rate=0.05,
            weight_decay=1e-4,
            shift=1,
        ),
        Recipe(
            name="resnet20-mnist",
            dataset="mnist",
            model=resnet_cifar(20),
            preprocessing=MNIST,
            epochs=8,
            batch_size=64,
            learning_rate=0.05,
            shift=2,
            sizes=((0.4, 16),),
        ),
        Recipe(
            name="vit-mnist",
            dataset="mnist",
            model=VisionTransformer(),
            preprocessing=MNIST,
            epochs=20,
            learning_rate=0.05,
            weight_decay=1e-4,
            average_decay=0.999,
            shift=2,
        ),
        Recipe(
            name="resnet20-cifar10",
            dataset="cifar10",
            model=resnet_cifar(20, shortcut="projection"),
            preprocessing=CIFAR10,
            epochs=54,
            batch_size=64,
            learning_rate=0.07,
            warmup=2 / 54,
            steady=28 / 54,
            average_decay=0.999,
            shift=4,
            flip=True,
            sizes=((12 / 54, 16),),
            evaluate_every=6,
        ),
        Recipe(
            name="resnet18-cifar10",
            dataset="cifar10",
            model=resnet_imagenet(18, num_classes=10, large_stem=False),
            preprocessing=CIFAR10,
            epochs=60,
            shift=4,
            flip=True,
            label_smoothing=0.1,
        ),
        Recipe(
            name="resnet18-mnist",
            dataset="mnist",
            model=resnet_imagenet(18, num_classes=10, large_stem=False),
            preprocessing=MNIST,
            epochs=10,
            shift=2,
        ),
    )
}
