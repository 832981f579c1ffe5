"""The fastest lowerings of a network's layers, measured on this machine."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import atomic
from qjax.cache import cache_dir
from qjax.formats.affine import QParams
from qjax.graph.layers import Site
from qjax.graph.operation import along_channels
from qjax.integer.chunks import by_chunks, chunk_size
from qjax.integer.codes import grid_key, requantized, stored
from qjax.integer.constants import Constants, Spec, constants_of
from qjax.integer.lowerings import LOWERINGS, Lowering, accumulate, operands, signed
from qjax.integer.processor import name_of_processor
from qjax.integer.requantize import FLOAT
from qjax.quantize import Quantized
from qjax.run.layer import QuantizedLayer
from qjax.threads import cores

_FILE = "lowerings.json"  # in the cache folder: seconds by machine, layer and method
_SECONDS = 0.05  # that each lowering of a layer is measured for
_LEAST_ROUNDS = 5


def measure(
    q: Quantized, x: Any, *, folder: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Finds the fastest lowering of every layer on this machine, by time.

    Every exact lowering of a layer is compiled with its requantization and timed in turns with the
    others on random codes. What was measured is kept on disk, by machine, version of JAX, shape of
    the layer and batch, so that it is measured once.

    Args:
      q: the result of `qjax.quantize`.
      x: an input of the batch that will be run, or its shape.
      folder: to keep it in; by default QJAX_CACHE_DIR, or `qjax` in the user's cache folder.

    Returns:
      The name of a lowering by layer, as `qjax.integer(q, lowering=...)` takes it, of the layers
      with an integer accumulator.

    Examples:
      >>> import tempfile, jax.numpy as jnp, qjax
      >>> params = {"dense": jnp.array([[0.5, -1.0], [1.0, 0.25]])}
      >>> x = jnp.array([[1.0, 2.0], [3.0, -4.0]])
      >>> q = qjax.quantize(lambda params, x: x @ params["dense"], params, x, bits=8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     fastest = qjax.lowerings.measure(q, x, folder=folder)
      >>> run = qjax.integer(q, lowering=fastest)
      >>> list(fastest), bool(jnp.all(run(q.params, x) == q.apply_fn(q.params, x)))
      (['dense'], True)
    """
    file = Path(folder or cache_dir()) / _FILE
    kept, machine = _read(file), _machine()
    known = kept.setdefault(machine, {})
    layers: Mapping[str, QuantizedLayer] = q.params["layers"]
    fastest, before = {}, len(known)
    for site in q.apply_fn.network(x).first_sites:
        layer, operation = layers[site.layer.name], site.layer.operation
        if not layer.has_integer_accumulator:
            continue
        found = {name: method.lower(operation, layer) for name, method in LOWERINGS.items()}
        exact = {name: lowering for name, lowering in found.items() if lowering is not None}
        key = repr((operation, site.layer.input_shape, layer.outputs is None, *exact.values()))
        if key not in known:
            known[key] = dict(zip(exact, _time(site, layer, list(exact.values())), strict=True))
        fastest[site.layer.name] = min(known[key], key=known[key].__getitem__)
    if len(known) > before:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, json.dumps(kept, indent=1))
    return fastest


def _read(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What was measured before: by machine, layer and method; nothing from a damaged file."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _time(site: Site, layer: QuantizedLayer, lowerings: Sequence[Lowering]) -> list[float]:
    """The least seconds that each lowering of a layer takes, in turns."""
    assert layer.grid is not None
    grid = signed(layer.grid)
    own, limits = site.layer.input_shape, (int(grid.qmin), int(grid.qmax))
    shape = [own[axis] for axis in site.layer.operation.input_order(len(own))]
    codes = np.random.default_rng(0).integers(*limits, shape, endpoint=True)
    x = jnp.asarray(codes, grid.dtype)
    runs = [_run(site, layer, lowering, x) for lowering in lowerings]
    least = [min(_seconds(run), _seconds(run)) for run in runs]
    end, rounds = time.perf_counter() + _SECONDS * len(runs), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        least = [min(before, _seconds(run)) for before, run in zip(least, runs, strict=True)]
        rounds += 1
    return least


def _run(
    site: Site, layer: QuantizedLayer, lowering: Lowering, x: jax.Array
) -> Callable[[], jax.Array]:
    """A layer, compiled: from codes to codes, or to real values where its output has no grid."""
    operation = site.layer.operation.channels_last
    spec = Spec(site.layer.name, operation, lowering.method)
    found = constants_of((spec,), {site.layer.name: layer})[site.layer.name]
    inputs_key, key = grid_key(layer.grid), grid_key(layer.outputs)

    @jax.jit
    def run(layer: QuantizedLayer, found: Constants, x: jax.Array) -> jax.Array:
        assert layer.grid is not None and inputs_key is not None
        zero_point = stored(layer.grid, inputs_key).zero_point
        outputs = layer.outputs if isinstance(layer.outputs, QParams) else None

        def output(x: jax.Array) -> jax.Array:
            given = operands(operation, layer, found.bias, lowering, found.kernel)
            acc = accumulate(operation, given, x, zero_point, lowering)
            unit = along_channels(operation, found.unit, acc.ndim)
            y = requantized(acc, unit, outputs, key, 0, jnp.float32, FLOAT)
            return y if isinstance(y, jax.Array) else y.codes

        return by_chunks(output, x, chunk_size(operation, lowering, x))

    return lambda: run(layer, found, x)


def _seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    run().block_until_ready()
    return time.perf_counter() - start


def _machine() -> str:
    """What the time of a program depends on, apart from the program."""
    device = jax.devices()[0]
    return f"{device.device_kind}, {name_of_processor()}, {cores()} cores, jax {jax.__version__}"
