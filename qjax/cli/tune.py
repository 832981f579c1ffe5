"""`--tune`: scales and biases are tuned on training images, without their labels."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from pretrained import datasets
from qjax.cli.loading import Loaded, at_least_one, dataset_of
from qjax.cli.wording import worded
from qjax.progress import Progress
from qjax.quantize import Quantized
from qjax.tuning.tune import STEPS, Settings, Tuned, run_tuning

SIZE = 4096  # training images, or all of them if there are fewer


def add_arguments(add: Callable[..., Any]) -> None:
    """Declares the options, by a parser's or a group's `add_argument`."""
    add(
        "--tune",
        type=int,
        nargs="?",
        const=STEPS,
        metavar="STEPS",
        help="after quantizing, tune scales and biases (not codes) toward the outputs of the "
        f"float model on unlabeled training images ({STEPS} steps)",
    )
    add(
        "--tune-size",
        type=at_least_one,
        metavar="N",
        help=f"number of training images for tuning ({SIZE}, or all if there are fewer)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuses options of tuning without tuning, and tuning without images.

    Raises:
      ValueError: an option is not possible.
    """
    if arguments.tune is None:
        if arguments.tune_size is not None:
            raise ValueError("`--tune-size` is for tuning; add `--tune`, or leave it out.")
        return
    if arguments.tune < 1:
        raise ValueError(f"`--tune` must be at least 1 step; got {arguments.tune}.")
    if arguments.data_free:
        raise ValueError("`--data-free` has no images to tune on; leave out one of them.")


def run(arguments: argparse.Namespace, loaded: Loaded, q: Quantized, progress: Progress) -> Tuned:
    """Tunes a quantized model on training images."""
    model = loaded.model
    images = datasets.load(dataset_of(model, arguments.dataset), "train").images
    size = min(arguments.tune_size or SIZE, len(images))
    drawn = model.preprocess(datasets.calibration_draw(images, size, arguments.seed))
    settings = Settings(steps=arguments.tune, seed=arguments.seed)
    where: dict[str, Any] = {"progress": progress, "checkpoint": arguments.checkpoint}
    words = {"images": "`--tune-size`", "apply_fn": "`--model`", "q": "the quantized `--model`"}
    with worded(words):
        return run_tuning(q, model.apply_fn, model.params, drawn, settings, **where)


def to_json(arguments: argparse.Namespace, found: Tuned) -> dict[str, Any]:
    """What came of it, as JSON values."""
    before, after = found.before._asdict(), found.after._asdict()
    return {"steps": arguments.tune, "before": before, "after": after, "is_kept": found.is_kept}


def summary(result: Mapping[str, Any]) -> str:
    """A line about what came of it, from `to_json`."""
    before, after = result["before"], result["after"]
    changes = ", ".join(f"{kind} {before[kind]:.4f} → {after[kind]:.4f}" for kind in before)
    kept = "" if result["is_kept"] else ": not kept, as it rose"
    return f"tuning       {result['steps']} steps, divergence held out: {changes}{kept}"
