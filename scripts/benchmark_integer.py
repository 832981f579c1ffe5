"""The benchmarks of `qjax.integer`: `benchmark.py integer`, `lowerings` and `agreement`."""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from measure import device, side_by_side
from safetensors.numpy import save_file

import pretrained
import qjax
from pretrained import datasets
from pretrained.mobilenet import Block, MobileNet
from pretrained.resnet import resnet_cifar, resnet_imagenet
from qjax.integer.lowerings import LOWERINGS
from qjax.integer.requantize import ARITHMETICS
from qjax.progress import progress_bar

CALIBRATION_IMAGES = 128
TEST_BATCH = 500
PEAK_IMAGES = 128
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet_cifar(20),
    "resnet18": lambda: resnet_imagenet(18, num_classes=10, large_stem=False),
    "mobilenet": lambda: MobileNet(32, _inverted_residuals(), head=640, num_classes=10),
}
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2), (6, 64, 2, 2), (6, 96, 1, 1))


def _inverted_residuals() -> tuple[Block, ...]:
    """The first blocks of MobileNetV2, half as deep, with strides for images of 32x32."""
    blocks, inputs = [], 32
    for expansion, channels, count, stride in _STAGES:
        for i in range(count):
            blocks.append(Block(inputs * expansion, 3, 1 if i else stride, channels))
            inputs = channels
    return tuple(blocks)


def add_integer(commands: Any) -> None:
    """Adds the command `integer`."""
    text = "images per second and size of integer and float32 inference, side by side"
    parser = commands.add_parser("integer", help=text, description=text)
    _add_arguments(parser)
    add = parser.add_argument
    add("--batches", nargs="+", type=int, default=[1, 32, 128], metavar="N", help="images per call")
    parser.set_defaults(run=run_integer)


def add_lowerings(commands: Any) -> None:
    """Adds the command `lowerings`."""
    text = "time of every lowering of every shape of layer, on which the default lowerings rest"
    parser = commands.add_parser("lowerings", help=text, description=text)
    _add_arguments(parser)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images (%(default)s)")
    parser.set_defaults(run=run_lowerings)


def add_agreement(commands: Any) -> None:
    """Adds the command `agreement`."""
    text = (
        "how far the codes of integer evaluation are from fake quantization's, on all test images"
    )
    parser = commands.add_parser("agreement", help=text, description=text)
    add = parser.add_argument
    add("--models", nargs="+", default=["lenet5-mnist", "resnet20-cifar10"], metavar="NAME|PATH")
    add("--bits", type=int, default=8, metavar="N", help="width of all tensors (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    parser.set_defaults(run=run_agreement)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    add("--seconds", type=float, default=4.0, metavar="S", help="per variant (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")


def network(name: str, recipe: qjax.Recipe) -> tuple[Callable[..., Any], Any, qjax.Quantized]:
    """A quantized network of random weights: time does not depend on their values."""
    model = NETWORKS[name]()
    images = np.random.default_rng(0).standard_normal((CALIBRATION_IMAGES, 32, 32, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    apply_fn: Callable[..., Any] = model.apply
    return apply_fn, variables, qjax.quantize(apply_fn, variables, images, recipe)


def run_integer(arguments: argparse.Namespace) -> None:
    """Measures and prints speed and size."""
    print(f"8 bits everywhere, random weights, images of 32x32, {device()}\n")
    print(f"{'':30}times as fast as float32, of{'':14}first call: float,")
    print(
        "network     images   float32/s   integers   in sums too   4-bit, packed   float, integers"
    )
    results = []
    for name in arguments.networks:
        variants = speed_variants(name)
        for batch in arguments.batches:
            x = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
            times = side_by_side([partial(run, x) for run in variants], arguments.seconds)
            ratios = "".join(
                f"{times.ratios[i]:>{width}.2f}" for i, width in ((1, 11), (2, 14), (3, 16))
            )
            print(
                f"{name:10}{batch:>8}{batch / times.median[0]:>12.1f}{ratios}"
                f"{times.first[0]:>8.1f} s,{times.first[1]:>5.1f} s",
                flush=True,
            )
            results.append({"network": name, "images": batch, **times._asdict()})
    print("\nratios: medians over rounds in which all took turns\n")
    print(
        "network     bits   float on disk   quantized   ratio   float in memory   quantized   ratio"
    )
    for name in arguments.networks:
        for bits in (8, 4):
            sizes = measure_sizes(name, bits)
            disk, memory = (
                f"{plain / 1e6:>9.2f} MB{small / 1e6:>9.2f} MB{small / plain:>8.3f}"
                for plain, small in (sizes.disk, sizes.memory)
            )
            print(f"{name:10}{bits:>6}{disk:>33}{memory:>35}")
            results.append({"network": name, "bits": bits, **sizes._asdict()})
    print(f"\npeak of the arrays of a call with {PEAK_IMAGES} images, parameters included\n")
    print("network        float    integers   ratio")
    for name in arguments.networks:
        plain, small = measure_peaks(name)
        print(f"{name:10}{plain / 1e6:>7.1f} MB{small / 1e6:>9.1f} MB{small / plain:>8.3f}")
        results.append({"network": name, "peak": (plain, small)})
    if arguments.json:
        print(json.dumps(results))


def speed_variants(name: str) -> list[Callable[[jax.Array], jax.Array]]:
    """A network in float32, on integers, with sums on integers too, and with packed weights."""
    apply_fn, variables, q = network(name, qjax.recipe(8).naive())
    _, _, sums = network(name, qjax.recipe(8, sums="quantized").naive())
    _, _, narrow = network(name, qjax.recipe(8, weight_bits=4).naive())
    plain, run, run_sums = jax.jit(apply_fn), qjax.integer(q), qjax.integer(sums)
    packed, run_narrow = qjax.pack(narrow.params), qjax.integer(narrow)
    unpacking = jax.jit(lambda packed, x: run_narrow(qjax.unpack(packed), x))
    return [
        partial(plain, variables),
        partial(run, q.params),
        partial(run_sums, sums.params),
        partial(unpacking, packed),
    ]


def measure_peaks(name: str) -> tuple[int, int]:
    """Bytes that a call holds at most, by XLA's plan of its memory: (float, on integers)."""
    apply_fn, variables, q = network(name, qjax.recipe(8).naive())
    x = jax.ShapeDtypeStruct((PEAK_IMAGES, 32, 32, 3), jnp.float32)
    calls = (jax.jit(apply_fn), variables), (jax.jit(qjax.integer(q)), q.params)
    plain, small = (_peak(function, params, x) for function, params in calls)
    return plain, small


def _peak(function: Any, params: Any, x: Any) -> int:
    found = function.lower(params, x).compile().memory_analysis()
    sizes = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    return sum(sizes)


class Sizes(NamedTuple):
    """Bytes of the parameters, (float, quantized).

    Attributes:
      disk: as one safetensors file, and as the file of codes in an artifact.
      memory: of all arrays, codes packed by `qjax.pack`.
    """

    disk: tuple[int, int]
    memory: tuple[int, int]


def measure_sizes(name: str, bits: int) -> Sizes:
    """The sizes of a network at a width."""
    _, variables, q = network(name, qjax.recipe(bits).naive())
    leaves = jax.tree.leaves(variables)
    codes = jax.tree.leaves(qjax.pack(q.params))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.safetensors"
        save_file({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}, file)
        qjax.save(Path(folder) / "q", q)
        [stored] = Path(folder, "q").glob("model-*.safetensors")
        disk = file.stat().st_size, stored.stat().st_size
    return Sizes(disk, (sum(a.nbytes for a in leaves), sum(a.nbytes for a in codes)))


def run_lowerings(arguments: argparse.Namespace) -> None:
    """Times a network of one layer for every shape of layer and every lowering."""
    print(f"8 bits, {arguments.batch} images, milliseconds of a layer's fastest call, {device()}\n")
    print(f"{'input':>16}{'kernel':>14}{'stride':>8}{'float net':>11}", end="")
    print("".join(f"{name:>9}" for name in LOWERINGS) + "   chosen")
    results, seen = [], set()
    for name in arguments.networks:
        model = NETWORKS[name]()
        shape = jax.ShapeDtypeStruct((arguments.batch, 32, 32, 3), jnp.float32)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        for layer in qjax.trace(model.apply, variables, shape):
            operation, x_shape = layer.operation, layer.input_shape
            key = (x_shape, operation)
            if key in seen:
                continue
            seen.add(key)
            plain, times, chosen = time_lowerings(operation, x_shape, arguments.seconds)
            stride = getattr(operation, "window_strides", (1,))[0]
            kernel = "x".join(map(str, operation.kernel_shape))
            row = "".join(
                f"{times[name] * 1e3:>9.2f}" if name in times else f"{'':9}" for name in LOWERINGS
            )
            size = "x".join(map(str, x_shape[1:]))
            print(f"{size:>16}{kernel:>14}{stride:>8}{plain * 1e3:>11.2f}{row}   {chosen}")
            fields = {"input": x_shape, "kernel": operation.kernel_shape, "stride": stride}
            results.append(fields | {"chosen": chosen, "float": plain, "least": times})
    if arguments.json:
        print(json.dumps(results))


def time_lowerings(
    operation: Any, x_shape: tuple[int, ...], seconds: float
) -> tuple[float, dict[str, float], str]:
    """Times one layer: (seconds in float, in every exact lowering, the lowering of the table)."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal(operation.kernel_shape, np.float32)}
    x = jnp.asarray(rng.standard_normal(x_shape, np.float32))

    def layer(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(operation.apply(x, params["kernel"]))

    q = qjax.quantize(layer, params, x, qjax.recipe(8).naive())
    plain = jax.jit(layer)
    (layer_q,) = q.params["layers"].values()
    names = [name for name, method in LOWERINGS.items() if method.lower(operation, layer_q)]
    runs = [qjax.integer(q, lowering=name) for name in names]
    variants = [partial(plain, params, x), *(partial(run, q.params, x) for run in runs)]
    (chosen,) = qjax.integer(q).lowerings(x).values()
    times = side_by_side(variants, seconds)
    return times.least[0], dict(zip(names, times.least[1:], strict=True)), chosen.method.name


def run_agreement(arguments: argparse.Namespace) -> None:
    """Compares every arithmetic of requantization with fake quantization."""
    results = []
    for name in arguments.models:
        model = pretrained.load(name)
        images = datasets.load(model.dataset, "train").images
        drawn = datasets.calibration_draw(images, min(1024, len(images) - 1), 0)
        recipe = qjax.recipe(arguments.bits)
        q = qjax.quantize(model.apply_fn, model.params, model.preprocess(drawn), recipe)
        test = datasets.load(model.dataset, "test")
        with progress_bar(model.name) as progress:
            found = compare_codes(q, model.preprocess, test, progress)
        print(f"\n{Path(model.name).name}, {arguments.bits} bits, {len(test.images):,} test images")
        print("arithmetic       codes that differ   by at most   top-1")
        for arithmetic, row in found.items():
            print(f"{arithmetic:12}{row.differing:>20.4%}{row.largest:>13}{row.top1:>8.2f}")
            results.append({"model": name, "arithmetic": arithmetic, **row._asdict()})
    if arguments.json:
        print(json.dumps(results))


class Agreement(NamedTuple):
    """How an evaluation compares with fake quantization.

    Attributes:
      differing: the share of the codes of all layers' outputs that differ.
      largest: by how many steps at most.
      top1: the accuracy in percent, by the codes of the last layer.
    """

    differing: float
    largest: int
    top1: float


def compare_codes(
    q: qjax.Quantized, preprocess: Callable[[Any], Any], test: Any, progress: Any
) -> dict[str, Agreement]:
    """Compares the codes of every layer on every test image, by arithmetic."""
    runs = {"fake": q.apply_fn.codes}
    runs |= {name: qjax.integer(q, arithmetic=name).codes for name in ARITHMETICS}
    differing, largest, right = (dict.fromkeys(runs, 0) for _ in range(3))
    total = 0
    for start in range(0, len(test.images), TEST_BATCH):
        progress("", start, len(test.images))
        x, labels = (a[start : start + TEST_BATCH] for a in (test.images, test.labels))
        x = preprocess(x)
        codes = {name: jax.device_get(run(q.params, x)) for name, run in runs.items()}
        total += sum(array.size for array in codes["fake"].values())
        for name, found in codes.items():
            for layer, expected in codes["fake"].items():
                off = np.abs(found[layer].astype(np.int64) - expected)
                differing[name] += int(np.count_nonzero(off))
                largest[name] = max(largest[name], int(off.max()))
            logits = found[q.report[-1].name]
            right[name] += int(np.sum(logits.argmax(-1) == labels))
    return {
        name: Agreement(
            differing[name] / total, largest[name], 100 * right[name] / len(test.labels)
        )
        for name in runs
    }
