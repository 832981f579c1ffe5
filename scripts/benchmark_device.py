"""`benchmark.py device` and `memory`: calibration and inference on whatever device there is."""

import argparse
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_search import resnet20
from measure import device, in_own_process, timed

import qjax
from pretrained.resnet import resnet_imagenet
from qjax.fit.memory import MEMORIES
from qjax.integer.trial import are_exact

BATCH = 256


def add_device(commands: Any) -> None:
    """Adds the command `device`."""
    text = "calibration, inference and agreement with the CPU, on this device; one line of JSON"
    parser = commands.add_parser("device", help=text, description=text)
    add = parser.add_argument
    add("--images", type=int, default=1024, metavar="N", help="of 32x32 (%(default)s)")
    add("--bits", nargs="+", type=int, default=[8, 4], metavar="N", help="of all tensors")
    add("--repeats", type=int, default=5, metavar="N", help="for the medians (%(default)s)")
    parser.set_defaults(run=run_device)


def run_device(arguments: argparse.Namespace) -> None:
    """Measures ResNet-20 of random weights and prints a line of JSON."""
    apply_fn, params = resnet20()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.images, 32, 32, 3), np.float32)
    x = jnp.asarray(images[:BATCH])
    found: dict[str, Any] = {"device": device(), "images": arguments.images, "jax": jax.__version__}
    found["int8_convolutions_exact"] = {"plain": are_exact(False), "grouped": are_exact(True)}
    run = jax.jit(apply_fn)
    found["float_ms"] = _milliseconds(partial(run, params, x), arguments.repeats)
    for bits in arguments.bits:
        quantized = partial(qjax.quantize, apply_fn, params, images, bits=bits)
        first, later = timed(lambda make=quantized: make().params, 1)
        q = quantized()
        integers = qjax.integer(q)
        codes, exact = q.apply_fn.codes(q.params, x), integers.codes(q.params, x)
        with jax.default_device(jax.devices("cpu")[0]):
            reference = qjax.quantize(apply_fn, jax.tree.map(np.asarray, params), images, bits=bits)
        found[f"{bits} bits"] = {
            "calibration_first_s": first,
            "calibration_s": later,
            "fake_ms": _milliseconds(partial(q.apply_fn, q.params, x), arguments.repeats),
            "integer_ms": _milliseconds(partial(integers, q.params, x), arguments.repeats),
            "integer_codes_equal": _agreement(codes, exact),
            "kernel_codes_equal_cpu": _agreement(_kernels(q), _kernels(reference)),
        }
    print(json.dumps(found))


def _milliseconds(function: Any, repeats: int) -> float:
    return 1e3 * timed(function, repeats)[1]


def _kernels(q: qjax.Quantized) -> dict[str, Any]:
    return {name: layer.kernel for name, layer in q.params["layers"].items()}


def _agreement(some: dict[str, Any], others: dict[str, Any]) -> float:
    """The share of equal codes."""
    pairs = [(np.asarray(some[name]), np.asarray(others[name])) for name in some]
    return sum(int(np.sum(a == b)) for a, b in pairs) / sum(a.size for a, _ in pairs)


def add_memory(commands: Any) -> None:
    """Adds the command `memory`."""
    text = "time and peak memory of quantizing an ImageNet network, by where values are kept"
    parser = commands.add_parser("memory", help=text, description=text)
    add = parser.add_argument
    add("--memory", nargs="+", choices=tuple(MEMORIES), default=list(MEMORIES), metavar="NAME")
    add("--depth", type=int, choices=(18, 34, 50), default=50, metavar="N", help="of the ResNet")
    add("--images", type=int, default=256, metavar="N", help="(%(default)s)")
    add("--size", type=int, default=224, metavar="N", help="their height and width (%(default)s)")
    add("--bits", type=int, default=8, metavar="N", help="of all tensors (%(default)s)")
    add("--naive", action="store_true", help="absmax ranges, nearest rounding")
    parser.set_defaults(run=run_memory)


def run_memory(arguments: argparse.Namespace) -> None:
    """Measures each place in a process of its own and prints a table."""
    recipe = "naive" if arguments.naive else "default recipe"
    print(
        f"ResNet-{arguments.depth}, random weights, {arguments.images} images of "
        f"{arguments.size}x{arguments.size}, {arguments.bits} bits, {recipe}, {device()}\n"
    )
    print(f"{'memory':12}{'first call':>12}{'peak memory':>14}")
    for name in arguments.memory:
        given = argparse.Namespace(**vars(arguments) | {"memory": name})
        row = in_own_process(time_memory, given)
        print(f"{name:12}{row.first:>10.0f} s{row.peak / 1e9:>11.2f} GB", flush=True)


def time_memory(arguments: argparse.Namespace) -> tuple[float, float, list[float]]:
    """Quantizes once."""
    model = resnet_imagenet(arguments.depth)
    size = arguments.size
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    recipe = qjax.recipe(arguments.bits)

    def images() -> Any:
        rng = np.random.default_rng(0)
        for _ in range(arguments.images // 32):
            yield rng.standard_normal((32, size, size, 3), np.float32)

    recipe = recipe.naive() if arguments.naive else recipe
    start = time.perf_counter()
    q = qjax.quantize(model.apply, params, images, recipe, memory=arguments.memory)
    jax.block_until_ready(q.params)
    return time.perf_counter() - start, 0.0, []
