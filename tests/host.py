"""One of two processes of two CPU devices each, started by test_hosts.py.

python host.py PROCESS PORT JOB FOLDER
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import small

import qjax
from qjax import kept_arrays

COUNT = 2
QUICK: dict[str, Any] = {"grid_size": 8, "reconstructions": 1}
RNG = np.random.default_rng(0)
KERNELS = {name: np.float32(RNG.normal(size=(6, 6))) for name in "abcd"}
ROWS = np.float32(RNG.normal(size=(26, 6)))


def dense(params: Any, x: jax.Array) -> jax.Array:
    y = jax.nn.relu(x @ params["a"])
    z = jax.nn.relu(y @ params["b"]) @ params["c"]
    return jax.nn.relu(y + z) @ params["d"]


def attend(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ params[name] for name in "abc")
    return jax.nn.softmax(q @ k.mT, axis=-1) @ v @ params["d"]


FILTERS = {  # NumPy's: JAX may not run before the processes have met
    "conv": {
        "w": np.float32(RNG.normal(size=(2, 2, 2, 6))),
        "b": np.float32(RNG.normal(size=(1, 1, 1, 6))),
    },
    "head": {"w": np.float32(RNG.normal(size=(6, 4)))},
}
CONV = (small.apply_fn, FILTERS, small.images(24))
DENSE = (dense, KERNELS, ROWS)
ATTENTION = (attend, KERNELS, ROWS[:24].reshape(8, 3, 6))
# Network, images of the first process, options. 24 images divide among 4 devices, 26 among 2, 25
# among none.
CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "conv 8": (CONV, 15, {"recipe": qjax.recipe(8, **QUICK)}),
    "conv 4": (CONV, 15, {"recipe": qjax.recipe(4, **QUICK, equalize=True), "memory": "host"}),
    "dense 8": (DENSE, 9, {"recipe": qjax.recipe(8, **QUICK, sums="quantized")}),
    "dense 4": (DENSE, 9, {"recipe": qjax.recipe(4, **QUICK), "memory": "recompute"}),
    "attention": (ATTENTION, 5, {"recipe": qjax.recipe(8, **QUICK, matmuls="quantized")}),
    "undivided": ((dense, KERNELS, ROWS[:25]), 13, {"recipe": qjax.Recipe().naive()}),
}


def share(case: str, process: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    (apply_fn, params, x), count, options = CASES[case]
    return apply_fn, params, [x[:count], x[count:]][process], options


def quantize_all(process: int, folder: Path) -> None:
    """Quantizes all networks, and writes what this process has of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    for case in CASES:
        seen = []
        apply_fn, params, x, options = share(case, process)
        q = qjax.quantize(
            *(apply_fn, params, x),
            mesh=mesh,
            progress=lambda name, done, total, seen=seen: seen.append(name),
            **options,
        )
        assert bool(seen) == (process == 0)
        qjax.save(folder / f"{case} of {process}", q)
        x = CASES[case][0][2]
        arrays = {name: np.asarray(layer.kernel) for name, layer in q.params["layers"].items()}
        logits = np.asarray(q.apply_fn(q.params, x))
        np.savez(folder / f"{case} {process}.npz", logits=logits, **arrays)


def refuse(process: int, folder: Path) -> None:
    """Tries what is refused: in one process alone, in both."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    some = jax.sharding.Mesh(jax.devices()[:3], "data")
    naive = qjax.Recipe().naive()
    bad = [ROWS, ROWS * np.nan][process]
    wide = [ROWS, ROWS[:, :5]][process]
    tries = {
        "nan": (bad, naive, mesh),
        "shape": (wide, naive, mesh),
        "mesh": (ROWS, naive, some),
        "end": (ROWS, qjax.recipe(8, end_search=1), mesh),
    }
    for name, (x, recipe, own) in tries.items():
        try:
            qjax.quantize(dense, KERNELS, x, recipe, mesh=own)
        except ValueError as error:
            (folder / f"{name} {process}.txt").write_text(str(error))


def stop_at_c(process: int, folder: Path) -> None:
    """Fits two layers and waits until the other process is killed."""

    def wait(name: str, done: int, total: int) -> None:
        if name == "c":
            (folder / "reached").touch()
            while not (folder / "killed").exists():
                time.sleep(0.05)

    go_on(process, folder, wait)


def go_on(process: int, folder: Path, progress: Any = None) -> None:
    """Quantizes with a checkpoint, and writes which layers are fitted."""
    kept_arrays.PAUSE = 0
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    fitted = []
    apply_fn, params, x, options = share("dense 8", process)
    q = qjax.quantize(
        *(apply_fn, params, x),
        mesh=mesh,
        checkpoint=folder / "kept",
        progress=progress or (lambda name, done, total: fitted.append(name)),
        **options,
    )
    kernels = {name: np.asarray(layer.kernel) for name, layer in q.params["layers"].items()}
    np.savez(folder / f"resumed {process}.npz", fitted=np.array(fitted), **kernels)


def make() -> tuple[Any, Any]:
    """A model for the command line."""
    kernel = np.float32(np.random.default_rng(0).normal(size=(16, 10)))
    return (lambda params, x: x.reshape(len(x), -1) @ params["head"]), {"head": kernel}


JOBS = {job.__name__: job for job in (quantize_all, refuse, stop_at_c, go_on)}

if __name__ == "__main__":
    process, port, job, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", os.environ["QJAX_TEST_PROGRAMS"])
    jax.distributed.initialize(f"localhost:{port}", COUNT, process, heartbeat_timeout_seconds=10)
    for each in job.split(","):
        JOBS[each](process, folder)
