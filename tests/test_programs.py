"""Nothing is compiled twice: programs are counted, and what they hold of the process's memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

import qjax
from qjax.study.sensitivity import logits_sqnr_alone

MAPS = Path("/proc/self/maps")

RECIPE = qjax.recipe(8, grid_size=8, reconstructions=1)


def quantized(recipe: qjax.Recipe = RECIPE) -> qjax.Quantized:
    return qjax.quantize(small.apply_fn, small.make_params(), small.images(), recipe)


def test_ten_quantizations_of_one_network_compile_it_once(programs_compiled: list[str]):
    counts, maps = [], []
    for _ in range(10):
        q = quantized()
        jax.block_until_ready(q.apply_fn(q.params, small.images()))
        counts.append(len(programs_compiled))
        maps.append(len(MAPS.read_text().splitlines()) if MAPS.exists() else 0)
    assert counts[0] > 0 and counts[1:] == counts[:1] * 9
    # Memory that is allocated and freed makes a few maps come and go; a program takes several.
    assert max(maps[2:]) <= maps[1] + 20


def test_widths_that_are_stored_alike_share_programs(programs_compiled: list[str]):
    q = quantized()
    q.apply_fn(q.params, small.images())
    programs_compiled.clear()
    q = quantized(qjax.recipe(5, weight_bits=3, grid_size=8, reconstructions=1))
    q.apply_fn(q.params, small.images())
    assert not programs_compiled


def deep(params: Any, x: jax.Array) -> jax.Array:
    for kernel in params:
        x = jax.nn.relu(x @ kernel)
    return x


def test_each_layer_alone_is_measured_by_one_program(programs_compiled: list[str]):
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    counts = []
    for depth in (2, 6):
        kernels = [np.eye(6, dtype=np.float32) + i / 10 for i in range(depth)]
        q = qjax.quantize(deep, kernels, x, RECIPE)
        jax.block_until_ready(q.apply_fn(q.params, x))
        programs_compiled.clear()
        assert len(logits_sqnr_alone(q, kernels, x)) == depth
        counts.append(len(programs_compiled))
    assert counts[1] <= counts[0]  # the first one compiles what measures noise, too


def test_layers_of_equal_shape_share_programs(programs_compiled: list[str]):
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    kernels = [np.random.default_rng(i).normal(size=(6, 6)).astype(np.float32) for i in range(12)]
    qjax.quantize(deep, kernels[:3], x, RECIPE)
    shallow = len(programs_compiled)
    qjax.quantize(deep, kernels, x, RECIPE)
    # What is compiled again belongs to the network as a whole: its folded kernels.
    assert len(programs_compiled) - shallow <= 1


@pytest.mark.parametrize(
    ("recipe", "per_shape"), [(qjax.recipe(8), 4), (qjax.recipe(8).naive(), 1)]
)
def test_a_layer_shape_takes_few_programs(
    recipe: qjax.Recipe, per_shape: int, programs_compiled: list[str]
):
    # As many values as are sampled: fewer, and the search of output ranges is compiled by shape.
    x = np.random.default_rng(0).normal(size=(150, 600, 7)).astype(np.float32)
    sizes = [7, 5, 9, 4, 8]
    kernels = [
        np.random.default_rng(n).normal(size=(n, m)).astype(np.float32)
        for n, m in zip(sizes, sizes[1:], strict=False)
    ]
    qjax.quantize(deep, kernels, x, recipe)
    # Activations between layers, what is folded, images placed, the one search of all output
    # ranges, and the one that tries which options the compiler knows.
    others = len(kernels) + 4
    assert len(programs_compiled) <= per_shape * len(kernels) + others


PROBE = """
import json, os
import jax, qjax, pretrained
from pretrained import datasets
counts = []
compiled = "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: counts.append(event) if event == compiled else None
)
model = pretrained.load("resnet20-digits")
images = model.preprocess(datasets.load(model.dataset, "train").images[:64])
found = []
for _ in range(2):
    counts.clear()
    qjax.quantize(model.apply_fn, model.params, images, bits=8)
    found.append(len(counts))
print(json.dumps(found))
"""


def test_the_main_job_compiles_few_programs_and_none_the_second_time():
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    first, second = json.loads(result.stdout.splitlines()[-1])
    assert first <= 100 and second == 0
