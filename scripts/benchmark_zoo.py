"""The benchmark of many families of networks on integers: `benchmark.py zoo`."""

import argparse
import json
from functools import partial
from typing import Any

import jax
from measure import device, side_by_side
from zoo import inputs
from zoo_networks import NETWORKS

import qjax


def add_zoo(commands: Any) -> None:
    """Adds the command `zoo`."""
    text = "speed of integer against float32 inference, for small networks of many families"
    parser = commands.add_parser("zoo", help=text, description=text)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    add("--batches", nargs="+", type=int, default=[1, 32, 128], metavar="N", help="images per call")
    add("--seconds", type=float, default=1.0, metavar="S", help="per variant (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    parser.set_defaults(run=run_zoo)


def run_zoo(arguments: argparse.Namespace) -> None:
    """Measures network by network and prints the ratios."""
    print(f"8 bits everywhere, random weights, {device()}\n")
    print("times as fast as float32 on integers, medians over rounds in which both took turns\n")
    print(f"{'network':24}" + "".join(f"{f'{n} images':>14}" for n in arguments.batches))
    results = []
    for name in arguments.networks:
        print(f"{NETWORKS[name].family:24}", end="", flush=True)
        for batch, times in measured(name, arguments.batches, arguments.seconds).items():
            print(f"{times.ratios[1]:>14.2f}", end="", flush=True)
            results.append({"network": name, "images": batch, **times._asdict()})
        print()
    if arguments.json:
        print(json.dumps(results))


def measured(name: str, batches: list[int], seconds: float) -> dict[int, Any]:
    """Times of a network in float32 and on integers, by the number of images."""
    network = NETWORKS[name]
    apply_fn, params = network.make()
    calibration, _ = inputs(network.example)
    q = qjax.quantize(apply_fn, params, calibration, qjax.recipe(8).naive())
    plain, run = jax.jit(apply_fn), qjax.integer(q)
    found = {}
    for batch in batches:
        x = jax.random.normal(jax.random.key(1), (batch, *network.example))
        variants = [partial(plain, params, x), partial(run, q.params, x)]
        found[batch] = side_by_side(variants, seconds)
    return found
