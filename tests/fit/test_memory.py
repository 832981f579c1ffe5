"""Where values between layers are kept changes no code; images are read as often as needed."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import qjax
from qjax import placing
from qjax.fit import estimate, images, memory
from qjax.graph.layers import find_layers

STORES = [name for name, each in memory.MEMORIES.items() if each.store is not None]
RNG = np.random.default_rng(0)
KERNELS = {name: np.float32(RNG.normal(size=(6, 6))) for name in "abcd"}
ROWS = np.float32(RNG.normal(size=(25, 6)))


def dense(params: Any, x: jax.Array) -> jax.Array:
    """A residual sum, an activation of an unknown form, and a value that is read late."""
    y = jax.nn.relu(x @ params["a"])
    z = y + jnp.tanh(y @ params["b"]) @ params["c"]
    return (jax.nn.relu(z) + x) @ params["d"]


def loop(params: Any, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.relu(h @ params["a"]), None

    return jax.lax.scan(step, x, length=2)[0] @ params["d"]


NETWORKS: dict[str, Any] = {
    "conv": (small.apply_fn, small.make_params(), small.images(25)),
    "dense": (dense, KERNELS, ROWS),
    "loop": (loop, KERNELS, ROWS),
    "attention": (*attention.masked(), attention.inputs(25)),
}
QUICK: dict[str, Any] = {"grid_size": 8, "reconstructions": 1}
RECIPES = {
    "8 bits": qjax.recipe(8, **QUICK),
    "4 bits": qjax.recipe(4, **QUICK, end_search=1, logits=True),
    "naive": qjax.Recipe().naive(),
    "matmuls": qjax.recipe(8, **QUICK, matmuls="quantized"),
    "histograms": qjax.recipe(8, range_method="percentile", rounding="nearest", sweeps=0),
    "channels": qjax.recipe(
        *(4,),
        **QUICK,
        activation_granularity="per_channel",
        sums="quantized",
        output_position="both",
        equalize=True,
    ),
}
CASES = [
    ("conv", "8 bits"),
    ("conv", "4 bits"),
    ("dense", "8 bits"),
    ("dense", "4 bits"),
    ("dense", "histograms"),
    ("dense", "channels"),
    ("loop", "8 bits"),
    ("attention", "matmuls"),
]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "BATCH_SIZE", 9)  # 25 images in 3 batches of 8, one is out


def quantized(network: str, recipe: str, **options: Any) -> qjax.Quantized:
    apply_fn, params, x = NETWORKS[network]
    return qjax.quantize(apply_fn, params, options.pop("x", x), RECIPES[recipe], **options)


def assert_same(q: qjax.Quantized, expected: qjax.Quantized) -> None:
    """The same codes, and scales up to what one program rounds otherwise than several."""
    pairs = zip(jax.tree.leaves(q.params), jax.tree.leaves(expected.params), strict=True)
    for found, wanted in pairs:
        if jnp.issubdtype(wanted.dtype, jnp.floating):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found, wanted)
    for record, wanted in zip(q.report, expected.report, strict=True):
        np.testing.assert_allclose(record.output_sqnr_db, wanted.output_sqnr_db, rtol=1e-5)


@pytest.mark.parametrize(("network", "recipe"), CASES)
def test_every_memory_gives_the_same_codes(network: str, recipe: str):
    expected = quantized(network, recipe, memory="device")
    for name in STORES:
        assert_same(quantized(network, recipe, memory=name), expected)


@pytest.mark.parametrize(
    ("network", "recipe"), [("conv", "8 bits"), ("dense", "naive"), ("attention", "matmuls")]
)
def test_every_memory_gives_the_same_codes_on_a_mesh(
    mesh: jax.sharding.Mesh, network: str, recipe: str
):
    expected = quantized(network, recipe, memory="device", mesh=mesh)
    for name in STORES:
        assert_same(quantized(network, recipe, memory=name, mesh=mesh), expected)


def test_a_layer_holds_one_batch(monkeypatch: pytest.MonkeyPatch):
    """Arrays on the device while layers are fitted: a batch of activations, never all of them."""
    monkeypatch.setattr("qjax.fit.sampling.SAMPLED_VALUES", 64)
    monkeypatch.setattr("qjax.fit.sampling.SAMPLED_PATCHES", 8)
    x = np.float32(RNG.normal(size=(24, 22, 26, 2)))  # 3 batches
    largest = {}
    for name in ("device", "host"):
        before = {id(array) for array in jax.live_arrays()}
        seen = largest.setdefault(name, [])

        def look(*_: Any, before: Any = before, seen: Any = seen) -> None:
            seen += [array.nbytes for array in jax.live_arrays() if id(array) not in before]

        conv, params, _ = NETWORKS["conv"]
        recipe = RECIPES["8 bits"]
        host = memory.MEMORIES["host"]

        def store(function: Any, *given: Any, own: Any = host.store, look: Any = look) -> Any:
            def watched(*values: jax.Array) -> Any:
                found = function(*values)
                look()
                return found

            return own(watched, *given)

        with monkeypatch.context() as patch:
            patch.setitem(memory.MEMORIES, "host", host._replace(store=store))
            qjax.quantize(conv, params, x, recipe, memory=name, progress=look)
    activations = 24 * 11 * 13 * 6 * 4  # of the convolution, on all images
    assert max(largest["device"]) >= activations
    assert max(largest["host"]) <= x.nbytes / 3 == 8 * 22 * 26 * 2 * 4


class Loader:
    """Gives batches of uneven sizes whenever it is asked, as loaders of datasets do."""

    def __init__(self, x: np.ndarray, cuts: tuple[int, ...] = (3, 3, 17)) -> None:
        self.x, self.cuts, self.reads = x, cuts, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.reads += 1
        return iter(np.split(self.x, self.cuts))


@pytest.mark.parametrize("name", memory.MEMORIES)
def test_images_are_read_as_often_as_needed(name: str):
    expected = quantized("dense", "8 bits", memory="device")
    loader = Loader(ROWS)
    assert_same(quantized("dense", "8 bits", memory=name, x=loader), expected)
    assert loader.reads > 10 if name == "recompute" else loader.reads == 2
    again = Loader(ROWS, (20,))
    assert_same(quantized("dense", "8 bits", memory=name, x=lambda: iter(again)), expected)
    assert again.reads == loader.reads


def test_images_are_the_same_however_they_are_cut():
    found = {
        images.images_of(given).digest
        for given in (ROWS, list(ROWS[:, None]), Loader(ROWS), lambda: iter([ROWS]))
    }
    assert len(found) == 1
    assert images.images_of(ROWS[:-1]).digest not in found
    read = images.images_of(Loader(ROWS))
    assert read.total == 25 and not read.is_in_memory
    for size in (1, 4, 6, 25):
        batches = np.stack(list(read.batches([size] * (25 // size))))
        np.testing.assert_array_equal(batches.reshape(-1, 6), ROWS[: 25 // size * size])


def shuffling() -> Any:
    rng = np.random.default_rng(0)
    return lambda: iter([rng.permutation(ROWS)])


def shrinking() -> Any:
    sizes = iter(range(25, 0, -1))
    return lambda: iter([ROWS[: next(sizes)]])


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (shuffling(), "`batches` gave 25 images .* and other ones when it was read again; it must"),
        (shrinking(), "`batches` gave 25 images .* and 24 ones when .* Turn off shuffling"),
        (lambda: iter([]), "`batches` is empty; pass at least one image"),
        (lambda: iter([ROWS, ROWS[:, :3]]), "every batch must have images of the same shape"),
        (lambda: iter([ROWS * np.nan]), "`batches` must be finite"),
        (lambda: iter([ROWS[:0]]), "`batches` holds no image"),
    ],
)
def test_images_that_change_or_do_not_fit_are_refused(batches: Any, match: str):
    with pytest.raises(ValueError, match=match):
        quantized("dense", "naive", memory="host", x=batches)


@pytest.mark.parametrize("name", memory.MEMORIES)
@pytest.mark.parametrize("after", ["host", "device"])
@pytest.mark.parametrize(
    ("network", "recipe", "last"),
    [("dense", "8 bits", ["c", "d"]), ("attention", "matmuls", ["out"])],
)
def test_a_run_that_is_stopped_goes_on(
    tmp_path: Any,
    monkeypatch: Any,
    name: str,
    after: str,
    network: str,
    recipe: str,
    last: list[str],
):
    monkeypatch.setattr("qjax.kept_arrays.PAUSE", 0)
    expected = quantized(network, recipe, memory="device")

    def stop(layer: str, done: int, total: int) -> None:
        if layer == last[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(network, recipe, memory=name, checkpoint=tmp_path, progress=stop)
    fitted = []
    q = quantized(
        *(network, recipe),
        memory=after,
        checkpoint=tmp_path,
        progress=lambda layer, done, total: fitted.append(layer),
    )
    assert fitted == [*last, ""]
    assert_same(q, expected)


def test_the_disk_is_left_as_it_was(tmp_path: Any, monkeypatch: Any):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quantized("dense", "naive", memory="disk")
    assert not os.listdir(tmp_path)


def test_what_is_computed_again_is_computed_once_a_batch():
    calls = []

    def double(x: jax.Array) -> list[jax.Array]:
        calls.append(len(calls))
        return [2 * x, 3 * x]

    store = memory.MEMORIES["recompute"].store
    assert store is not None
    x: Any = [jnp.float32(1), jnp.float32(5)]
    two, three = store(double, [x], 2)
    [five] = store(lambda a, b: [a + b], [two, three], 1)
    assert not calls and len(five) == 2
    assert [float(value) for value in memory.batch_of([two, five, x], 1)] == [10, 25, 5]
    assert calls == [0]


def network_of(params: Any, x: Any) -> Any:
    return find_layers(dense, params, jax.ShapeDtypeStruct(x, jnp.float32))


def test_the_estimate_counts_what_is_live():
    network = network_of(KERNELS, (8, 6))
    # x, y and the output before it at the layer c: three arrays in two streams.
    found = estimate.stream_bytes(network, RECIPES["8 bits"], batches=5)
    assert found.kept == 5 * 2 * 3 * 8 * 6 * 4
    assert found.stacked == 5 * (2 * 3 + estimate.OF_A_LAYER) * 8 * 6 * 4
    one = estimate.stream_bytes(network, qjax.recipe(8, sequential=False), batches=5)
    assert one.kept == found.kept // 2


@pytest.mark.parametrize("position", range(4))
def test_the_default_is_the_first_that_fits(monkeypatch: Any, caplog: Any, position: int):
    caplog.set_level(logging.INFO, "qjax")
    network = network_of(KERNELS, (8, 6))
    for number, (name, each) in enumerate(list(memory.MEMORIES.items())):
        free = float("inf") if number >= position else 1e3
        monkeypatch.setitem(memory.MEMORIES, name, each._replace(room=lambda _, f=free: f))
    chosen = estimate.choose(None, network, RECIPES["8 bits"], 1000, jax.devices()[:1])
    assert chosen.name == list(memory.MEMORIES)[position]
    [record] = caplog.records
    assert record.levelno == (logging.WARNING if position else logging.INFO)
    assert f"are kept {chosen.label} (memory={chosen.name!r})" in record.message


def test_a_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="`memory` must be one of device, host, disk, recompute"):
        quantized("dense", "naive", memory="cloud")
    with pytest.raises(ValueError, match="`memory` keeps .* and `batches` has none; leave it out"):
        quantized("dense", "naive", memory="host", x=jax.ShapeDtypeStruct((1, 6), jnp.float32))
