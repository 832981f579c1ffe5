"""Measures time and memory; every number that README and docs state about speed comes from here.

python scripts/benchmark.py search
python scripts/benchmark.py ablation --models lenet5-mnist
python scripts/benchmark.py integer
python scripts/benchmark.py zoo
python scripts/benchmark.py growth
python scripts/benchmark.py scaling --devices 1 2 4 8
python scripts/benchmark.py device
python scripts/benchmark.py memory --memory host disk
python scripts/benchmark.py startup --against ../older-checkout
"""

import argparse
from functools import partial
from typing import Any

import benchmark_device
import benchmark_devices
import benchmark_integer
import benchmark_layers
import benchmark_search
import benchmark_startup
import benchmark_zoo
import evaluate
from measure import expect_random_images


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    benchmark_search.add_search(commands)
    add_ablation(commands)
    benchmark_search.add_growth(commands)
    benchmark_devices.add_devices(commands)
    benchmark_device.add_device(commands)
    benchmark_device.add_memory(commands)
    benchmark_integer.add_integer(commands)
    benchmark_integer.add_lowerings(commands)
    benchmark_integer.add_agreement(commands)
    benchmark_layers.add_layers(commands)
    benchmark_zoo.add_zoo(commands)
    benchmark_startup.add_startup(commands)
    arguments = parser.parse_args()
    expect_random_images()
    arguments.run(arguments)


def add_ablation(commands: Any) -> None:
    """Adds the command `ablation`."""
    text = "what each ingredient of the method adds to the accuracy"
    parser = commands.add_parser("ablation", help=text, description=text)
    evaluate.add_arguments(parser)
    parser.set_defaults(run=partial(evaluate.run, "ablation"))


if __name__ == "__main__":
    main()
