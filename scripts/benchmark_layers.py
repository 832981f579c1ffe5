"""The benchmark of what a network spends its time on: `benchmark.py layers`."""

import argparse
import collections
import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from benchmark_integer import NETWORKS, network
from measure import device

import qjax

CALLS = 10
BETWEEN = "between layers"
# What an operation of XLA is for, by the last part of its name in JAX; the rest requantizes, adds
# residual sums and activates.
PARTS = {
    "products": ("dot_general", "conv_general_dilated"),
    "patches": ("slice", "concatenate", "pad", "dynamic_update_slice", "broadcast_in_dim"),
}
REST = "requantization"


def add_layers(commands: Any) -> None:
    """Adds the command `layers`."""
    text = "milliseconds of every layer of an integer network: products, patches, requantization"
    parser = commands.add_parser("layers", help=text, description=text)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="resnet18", help="which network (%(default)s)")
    add("--batch", type=int, default=32, metavar="N", help="images (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    parser.set_defaults(run=run_layers)


def run_layers(arguments: argparse.Namespace) -> None:
    """Profiles a network and prints a row per layer."""
    _, _, q = network(arguments.network, qjax.recipe(8).naive())
    x = jax.random.normal(jax.random.key(1), (arguments.batch, 32, 32, 3))
    found = profile(q, x)
    columns = (*PARTS, REST)
    print(f"{arguments.network}, {arguments.batch} images, milliseconds, {device()}\n")
    print(f"{'layer':32}" + "".join(f"{part:>16}" for part in columns))
    total = collections.Counter()
    for name, parts in found.items():
        total.update(parts)
        print(f"{name:32}" + "".join(f"{parts[part]:>16.3f}" for part in columns))
    print(f"{'total':32}" + "".join(f"{total[part]:>16.3f}" for part in columns))
    if arguments.json:
        print(json.dumps(found))


def profile(q: qjax.Quantized, x: jax.Array) -> dict[str, dict[str, float]]:
    """The milliseconds of a call on integers, by layer and part, its params known to XLA."""
    # Within a trace the table of the fastest leaves some out, unless they are asked for.
    fastest = {name: found.method for name, found in qjax.integer(q).lowerings(x).items()}
    function = qjax.integer(q, lowering=fastest)
    run = jax.jit(lambda x: function(q.params, x))
    names = places(run.lower(x).compile().as_text() or "")
    jax.block_until_ready(run(x))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                jax.block_until_ready(run(x))
        [file] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    layers = [record.name for record in q.report]
    found = {name: dict.fromkeys((*PARTS, REST), 0.0) for name in (*layers, BETWEEN)}
    for event, milliseconds in seen(data).items():
        place = names.get(event, "")
        layer = max((name for name in layers if f"/{name}/" in place), key=len, default=BETWEEN)
        last = place.rpartition("/")[2]
        part = next((part for part, ends in PARTS.items() if last in ends), REST)
        found[layer][part] += milliseconds
    return found


def places(text: str) -> Mapping[str, str]:
    """Where in JAX each operation of a compiled program comes from, by the operation's name."""
    return dict(re.findall(r'%?([\w.-]+) = .*metadata=\{op_name="([^"]*)"', text))


def seen(data: Any) -> dict[str, float]:
    """The milliseconds of a call that each operation takes, loops without what is in them."""
    durations = collections.defaultdict(list)
    for event in (event for plane in data.planes for line in plane.lines for event in line.events):
        if "hlo_op" in dict(event.stats) and not event.name.startswith("while"):
            durations[event.name].append(event.duration_ns)
    return {
        name: statistics.median(column) * len(column) / CALLS / 1e6
        for name, column in durations.items()
    }
