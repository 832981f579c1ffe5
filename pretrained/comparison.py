"""Post-training quantization against quantization-aware training, at several widths.

Training starts at the quantized network, so that every run measures both. What is finished is kept
in a file of JSON lines, and a run that was interrupted goes on from its last step.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pretrained
from pretrained import finetuning
from pretrained.datasets import Dataset
from qjax.progress import Progress
from qjax.qat import METHODS

WIDTHS = (8, 4, 3, 2, 1)
TRAINED = ("lsq", "binary_connect", "xnor")

HEADER = ("bits", "w/i/o", "method", "post-training", "trained", "seconds", "training", "bytes")
ACCURACIES = (3, 4)  # columns of the header


class Case(NamedTuple):
    """One network to train.

    Attributes:
      bits: of weights, inputs and outputs; 1 for weights of one bit, with 8 bits for all else.
      method: a name in `qjax.qat.METHODS`.
      seed: of the draw of calibration images, the order and the augmentation.
    """

    bits: int
    method: str
    seed: int


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
      post_training: top-1 in percent before training.
      trained: top-1 in percent.
      quantizing_seconds: of post-training quantization, compilation among them.
      training_seconds: of training, without evaluation's.
      bytes: of kernels and biases with their scales, at their true widths.
    """

    post_training: float
    trained: float
    quantizing_seconds: float
    training_seconds: float
    bytes: int


def cases(widths: Sequence[int], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Case]:
    """What there is to train: binary methods at one bit, the others above.

    Examples:
      >>> [case.method for case in cases((2, 1), ("lsq", "xnor"), (0,))]
      ['lsq', 'xnor']
    """
    for bits in widths:
        for method in methods:
            if METHODS[method].needs_binary == (bits == 1):
                yield from (Case(bits, method, seed) for seed in seeds)


def formats(case: Case, ends: int) -> str:
    """The widths of weights, inputs and outputs, in words.

    Examples:
      >>> formats(Case(1, "xnor", 0), 8), formats(Case(3, "lsq", 0), 8)
      ('1/1/8', '3/3/3')
    """
    recipe = _quantization(case, ends)
    specs = (recipe.weights, recipe.inputs, recipe.outputs)
    return "/".join(str(spec.bits) for spec in specs if spec is not None)


def measure(
    loaded: pretrained.Pretrained,
    wanted: Sequence[Case],
    epochs: float,
    ends: int,
    data: Dataset,
    test: Dataset,
    folder: Path,
    progress: Progress,
) -> dict[Case, Outcome]:
    """Trains what is not finished yet.

    Args:
      loaded: the float model.
      wanted: what to train.
      epochs: of each.
      ends: bits of the first and of the last layer.
      data: the training split.
      test: the split that accuracy is measured on.
      folder: where finished outcomes and the states of training are kept.
      progress: called with (what is trained, steps done, steps) and the like.

    Returns:
      The outcomes of all that is wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "comparison.jsonl"
    kept, found = _read(path), {}
    for done, case in enumerate(wanted):
        recipe = finetuning.fine_tuning(
            loaded, case.method, _quantization(case, ends), epochs, seed=case.seed
        )
        key = f"{recipe.identifier}-{test.name}-{len(data.images)}-{len(test.images)}"
        if key not in kept:
            label = f"{case.bits} bits, {case.method}, seed {case.seed}"
            result = finetuning.train(
                loaded,
                recipe,
                data,
                test,
                folder / f"{recipe.identifier}.safetensors",
                lambda p, label=label, done=done: progress(
                    f"{label}: step {p.step} of {p.steps}, loss {p.loss:.3f}", done, len(wanted)
                ),
            )
            kept[key] = Outcome(
                result.start,
                result.trained.log[-1].accuracy,
                result.quantizing_seconds,
                result.trained.seconds,
                sum(record.bytes_quantized for record in result.q.report),
            )
            with path.open("a") as file:
                print(json.dumps({"key": key, **kept[key]._asdict()}), file=file)
        found[case] = kept[key]
    return found


def rows(found: dict[Case, Outcome], ends: int) -> list[tuple[str, ...]]:
    """The cells of a table under `HEADER`: means over the seeds ± their standard deviations."""
    lines = []
    for case in dict.fromkeys(case._replace(seed=0) for case in found):
        mine = [outcome for key, outcome in found.items() if key._replace(seed=0) == case]
        lines.append(
            (
                str(case.bits),
                formats(case, ends),
                case.method,
                _spread([outcome.post_training for outcome in mine]),
                _spread([outcome.trained for outcome in mine]),
                f"{statistics.mean(outcome.quantizing_seconds for outcome in mine):.0f}",
                f"{statistics.mean(outcome.training_seconds for outcome in mine):.0f}",
                f"{mine[0].bytes:,}",
            )
        )
    return lines


def _quantization(case: Case, ends: int) -> Any:
    return finetuning.quantization(case.method, 8 if case.bits == 1 else case.bits, ends)


def _read(path: Path) -> dict[str, Outcome]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line.pop("key"): Outcome(**line) for line in lines}


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
