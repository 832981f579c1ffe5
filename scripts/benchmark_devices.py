"""`benchmark.py scaling`: how the work of calibration is shared by devices.

Operations, bytes and collectives are counted in the programs that XLA compiled for one device, each
as often as it ran; bodies of loops count once for every step.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from measure import device, in_fresh_process

import qjax
from pretrained.resnet import resnet_cifar

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
FREE |= {"broadcast", "reshape", "copy", "transpose", "partition-id", "replica-id"}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}

_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass
class Counts:
    """What one device does.

    Attributes:
      products: operations of dot products and convolutions, two for each multiplication.
      others: elements that all else computes.
      sent: bytes of the results of collectives.
    """

    products: float = 0
    others: float = 0
    sent: float = 0

    def add(self, other: "Counts", times: float = 1) -> None:
        """Adds the counts of something that ran so many times."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name) + times * getattr(other, field.name)
            setattr(self, field.name, value)


def add_devices(commands: Any) -> None:
    """Adds the command `scaling`."""
    text = "how calibration is shared: operations, bytes and collectives by device"
    parser = commands.add_parser("scaling", help=text, description=text)
    add = parser.add_argument
    add("--devices", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N")
    add("--images", type=int, default=128, metavar="N", help="of 32x32 (%(default)s)")
    add("--depth", type=int, default=20, metavar="N", help="of the ResNet, 6n + 2 (%(default)s)")
    add("--bits", type=int, default=8, metavar="N", help="of all tensors (%(default)s)")
    add("--memory", default="device", metavar="NAME", help="of qjax.quantize (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    parser.set_defaults(run=run_devices)


def run_devices(arguments: argparse.Namespace) -> None:
    """Counts for each number of devices in a process of its own and prints a table."""
    fields = {key: value for key, value in vars(arguments).items() if key != "run"}
    rows = []
    for devices in arguments.devices:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)  # virtual ones, for the process to come
        given = argparse.Namespace(**fields | {"devices": devices})
        rows.append(in_fresh_process(count_work, given))
    print(
        f"ResNet-{arguments.depth}, {arguments.bits} bits, {arguments.images} images of 32x32, "
        f"{rows[0]['device']}; by device\n"
    )
    names = {
        "products": "GFLOP of products",
        "others": "G other elements",
        "live": "MB of activations",
        "sent": "MB of collectives",
        "seconds": "s, compiled",
    }
    print(f"{'devices':8}" + "".join(f"{text:>20}" for text in names.values()))
    for row in rows:
        values = []
        for name in names:
            share = f" ({row[name] / rows[0][name]:.2f})" if rows[0][name] else ""
            values.append(f"{row[name]:.3f}{share if name != 'seconds' else ''}")
        print(f"{row['devices']:<8}" + "".join(f"{value:>20}" for value in values))
    if arguments.json:
        print(json.dumps(rows))


def count_work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantizes on so many devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: arguments.devices]), "images")
    model = resnet_cifar(arguments.depth)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.images, 32, 32, 3), np.float32)
    recipe = qjax.recipe(arguments.bits)
    live: list[int] = [0]
    known = {id(leaf) for leaf in jax.tree.leaves(params)}

    def look(_name: str, _done: int, _total: int) -> None:
        arrays = [a for a in jax.live_arrays() if id(a) not in known and len(a.shape) > 3]
        live.append(sum(map(nbytes_on_first, arrays)))

    options: dict[str, Any] = {"mesh": mesh, "memory": arguments.memory}
    run = functools.partial(qjax.quantize, model.apply, params, images, recipe, **options)
    with counted() as counts:
        run(progress=look)
    start = time.perf_counter()
    jax.block_until_ready(run().params)
    return {
        "devices": arguments.devices,
        "device": device(),
        "products": counts.products / 1e9,
        "others": counts.others / 1e9,
        "live": max(live) / 1e6,
        "sent": counts.sent / 1e6,
        "seconds": time.perf_counter() - start,
    }


def nbytes_on_first(array: jax.Array) -> int:
    """The bytes of an array that the first device holds."""
    if jax.devices()[0] not in array.sharding.device_set:
        return 0
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


class counted:  # noqa: N801  (a context, named as a verb)
    """Counts what programs do that run while the context is open."""

    def __enter__(self) -> Counts:
        self._jit, counts = jax.jit, Counts()

        def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            jitted = self._jit(function, **options)
            found: dict[Any, Counts] = {}

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                leaves, structure = jax.tree.flatten((args, kwargs))
                if not any(isinstance(leaf, Tracer) for leaf in leaves):
                    key = structure, *map(_described, leaves)
                    if key not in found:
                        text = jitted.lower(*args, **kwargs).compile().as_text()
                        found[key] = count(text or "")
                    counts.add(found[key])
                return jitted(*args, **kwargs)

            return call

        jax.jit = jit  # pyright: ignore
        return counts

    def __exit__(self, *_: object) -> None:
        jax.jit = self._jit  # pyright: ignore


def _described(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", None))
    return leaf


def count(text: str) -> Counts:
    """Counts what a compiled program does on one device.

    Args:
      text: of its HLO.
    """
    computations: dict[str, list[tuple[str, str, str, str]]] = collections.defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            entry = name if line.startswith("ENTRY") else entry
        elif found := _LINE.match(line):
            computations[name].append((found[1], found[2], found[3], found[4]))

    @functools.cache
    def of(name: str) -> Counts:
        total = Counts()
        types = {value: type for value, type, _, _ in computations[name]}
        for _, type, operation, rest in computations[name]:
            called = re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", rest)
            if operation == "while":
                condition = re.findall(r"condition=%([\w.\-]+)", rest)[0]
                total.add(of(called[0]), _steps(rest, computations[condition]))
            elif operation in ("fusion", "call"):
                for each in called:
                    total.add(of(each))
            elif operation == "conditional":
                branches = re.findall(r"%([\w.\-]+)", rest.partition("branch_computations")[2])
                for each in branches[:1]:
                    total.add(of(each))
            elif operation in ("dot", "convolution"):
                total.products += _products(type, operation, rest, types)
            elif operation.removesuffix("-start") in COLLECTIVES:
                total.sent += sum(size * nbytes for size, nbytes in _arrays(type))
            elif operation in ("reduce", "reduce-window", "sort", "scatter"):
                operand = re.findall(r"%([\w.\-]+)", rest)[0]
                total.others += sum(size for size, _ in _arrays(types.get(operand, type)))
            elif operation not in FREE:
                total.others += sum(size for size, _ in _arrays(type))
        return total

    return of(entry)


def _steps(rest: str, condition: list[tuple[str, str, str, str]]) -> int:
    """How often a loop runs: as XLA says, or as the number that its counter is compared with."""
    if found := re.search(r'known_trip_count[^\d]*"?n"?:\s*"?(\d+)', rest):
        return int(found[1])
    numbers = [int(rest.partition(")")[0]) for _, type, o, rest in condition if _is_number(o, type)]
    return max(numbers, default=1)


def _is_number(operation: str, type: str) -> bool:
    return operation == "constant" and type in ("s32[]", "s64[]", "u32[]")


def _products(type: str, operation: str, rest: str, types: dict[str, str]) -> float:
    size = sum(size for size, _ in _arrays(type))
    left, right = (_shape(types[name]) for name in re.findall(r"%([\w.\-]+)", rest)[:2])
    if operation == "dot":
        axes = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[0].split(",")
        return 2 * size * math.prod(left[int(axis)] for axis in axes if axis)
    labels = re.findall(r"dim_labels=\w+_(\w+)->", rest)[0]
    return 2 * size * math.prod(right) / right[labels.index("o")]


def _shape(type: str) -> list[int]:
    found = _ARRAY.search(type)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _arrays(type: str) -> Iterator[tuple[int, int]]:
    """The elements of the arrays of a type, and the bytes of one."""
    for dtype, sizes in _ARRAY.findall(type):
        yield math.prod(int(size) for size in sizes.split(",") if size), BYTES.get(dtype, 4)
