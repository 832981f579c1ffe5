"""Exported networks: what another process reads computes the same, bit for bit, at any batch."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import export

import qjax
from qjax.formats.binary import Signs
from qjax.formats.spec import FORMATS
from qjax.graph.layers import shapes_of


class Exported(NamedTuple):
    """A function to export, and its params."""

    function: Callable[[Any, Any], Any]
    params: Any


def signs() -> Exported:
    q = small.quantized(weight_bits=1)
    conv = dataclasses.replace(q.params["layers"]["conv"], inputs=Signs(jnp.ones((1, 1, 1, 2)) / 8))
    conv = dataclasses.replace(conv, bias=conv.bias.astype(jnp.float32))
    return Exported(q.apply_fn, q.params | {"layers": q.params["layers"] | {"conv": conv}})


def packed() -> Exported:
    q = small.quantized(weight_bits=3)
    return Exported(lambda params, x: q.apply_fn(qjax.unpack(params), x), qjax.pack(q.params))


def dynamic() -> qjax.Quantized:
    spec = qjax.QuantSpec(8, False, "per_example", ranges="dynamic")
    return small.quantized(inputs=spec, outputs=spec)


def codebook(name: str) -> Exported:
    q = small.quantized(weights=qjax.QuantSpec(4, format=name))
    return Exported(q.apply_fn, q.params)


NETWORKS: dict[str, Callable[[], Exported]] = {
    "fake": lambda: Exported(small.quantized().apply_fn, small.quantized().params),
    "integer": lambda: Exported(qjax.integer(small.quantized()), small.quantized().params),
    "packed": packed,
    "dynamic": lambda: Exported(qjax.integer(dynamic()), dynamic().params),
    "signs": signs,
    "kmeans": lambda: codebook("kmeans"),
    "apot": lambda: codebook("apot"),
}

READER = """
import sys
import numpy as np
from jax import export, tree
import qjax  # the classes of the params

for name in sys.argv[1:]:
    exported = export.deserialize(bytearray(open(name + ".stablehlo", "rb").read()))
    stored = np.load(name + ".npz")
    leaves = [stored[str(i)] for i in range(len(stored.files))]
    (params, x), _ = tree.unflatten(exported.in_tree, leaves)
    np.save(name + ".npy", exported.call(params, x))
"""


def of_any_batch(x: Any) -> Any:
    """The shape of an input with a batch of any size."""
    (batch,) = export.symbolic_shape("batch")
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), x)


def test_another_process_computes_the_same_bit_for_bit(tmp_path: Path):
    x = small.images(5)
    expected = {}
    for name, network in NETWORKS.items():
        function, params = network()
        exported = export.export(jax.jit(function))(shapes_of(params), of_any_batch(x))
        (tmp_path / f"{name}.stablehlo").write_bytes(exported.serialize())
        leaves = map(np.asarray, jax.tree.leaves((params, x)))
        np.savez(tmp_path / f"{name}.npz", **{str(i): leaf for i, leaf in enumerate(leaves)})
        expected[name] = np.asarray(function(params, x))
    subprocess.run([sys.executable, "-c", READER, *NETWORKS], cwd=tmp_path, check=True)
    for name in NETWORKS:
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected[name])


@pytest.mark.parametrize(
    ("lowering", "arithmetic"), [("int8", "fixed_point"), ("dot", "float"), ("float32", "float")]
)
def test_every_lowering_takes_a_batch_of_any_size(lowering: str, arithmetic: str):
    q, x = small.quantized(), small.images(5)
    run = qjax.integer(q, lowering=lowering, arithmetic=arithmetic)
    exported = export.export(jax.jit(run))(shapes_of(q.params), of_any_batch(x))
    np.testing.assert_array_equal(exported.call(q.params, x), run(q.params, x))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_and_read(name: str):
    family = FORMATS[name]
    spec = qjax.QuantSpec(family.widths[min(3, len(family.widths) - 1)], format=name)
    ends = -jnp.ones((1, 1, 3)), jnp.ones((1, 1, 3))
    format = family.cover(*ends, spec, spec.limits)
    written = export.export(jax.jit(lambda format: format.step))(format).serialize()
    read = export.deserialize(written)
    assert read.in_tree == jax.tree.structure(((format,), {}))
    np.testing.assert_array_equal(read.call(format), format.step)


def test_static_fields_come_back_as_they_were():
    spec = qjax.QuantSpec(4, False, "per_example", ranges="dynamic").stored
    fields = (np.int32(0), np.int32(15), spec, 0, (0.0, float("inf")))
    layer = dynamic().params["layers"]["conv"]
    given = dataclasses.replace(layer, inputs=type(layer.inputs)(*fields))
    read = export.deserialize(export.export(jax.jit(lambda layer: layer.bias))(given).serialize())
    (found,), _ = jax.tree.unflatten(read.in_tree, jax.tree.leaves(given))
    assert found.inputs == given.inputs
