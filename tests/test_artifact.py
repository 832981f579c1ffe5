"""Saving and loading: every array bit for bit, true widths on disk, no damaged file accepted."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import equinox as eqx
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import small
from flax import nnx
from jax import export
from models import CASES
from safetensors.numpy import load_file

import qjax
from qjax.run.layer import QuantizedLayer

# Weights only and the cheapest range: what is tested here is what becomes of the result.
CHEAP: dict[str, Any] = dict(
    inputs=None, outputs=None, range_method="absmax", bias_correction=False, rounding="nearest"
)
FILES = ("manifest.json", "model-*.safetensors")


def network(params: Any, x: jax.Array) -> jax.Array:
    """Two dense layers; between them params that belong to neither, one bfloat16, one integer."""
    gain, order, _ = params["between"]
    w, b = params["first"]
    x = jax.nn.relu(x @ w + b) * gain.astype(jnp.float32)
    return x[:, order] @ params["head"][0]


def make_params() -> Any:
    """All the containers that a manifest can describe: dict, tuple, list, None, an integer key."""
    rng = np.random.default_rng(0)
    return {
        "first": (jnp.float32(rng.normal(size=(7, 5))), jnp.float32(rng.normal(size=(1, 5)))),
        "between": [jnp.bfloat16(rng.normal(size=(1, 5))), jnp.int16([4, 2, 0, 1, 3]), None],
        "head": {0: jnp.float32(rng.normal(size=(5, 3)))},
    }


X = jnp.float32(np.random.default_rng(1).normal(size=(6, 7)))


@pytest.fixture(scope="module")
def q() -> qjax.Quantized:
    """The first layer in float (lossless: ∞ dB), the last one quantized on every side."""
    head = {"weight_bits": 3, "input_bits": 8, "output_bits": 5}
    recipe = qjax.recipe(8, overrides={"first": {"weights": None}, "head": head}, **CHEAP)
    return qjax.quantize(network, make_params(), X, recipe)


@pytest.fixture
def saved(q: qjax.Quantized, tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    qjax.save(path, q)
    return path


def with_codes(q: qjax.Quantized, spec: qjax.QuantSpec) -> qjax.Quantized:
    """Puts random codes of another format, both extremes among them, into every layer."""
    rng = np.random.default_rng(spec.bits)

    def change(layer: QuantizedLayer) -> QuantizedLayer:
        groups, patch, channels = layer.kernel.shape
        blocks = -(-patch // spec.group_size) if spec.granularity == "per_group" else 1
        scale = jnp.float32(rng.uniform(0.5, 1.0, (groups, blocks, channels)))
        zero_point = jnp.zeros(scale.shape, jnp.int32)
        weights = qjax.QParams(scale, zero_point, spec.qmin, spec.qmax)
        codes = rng.integers(spec.qmin, spec.qmax, layer.kernel.shape, endpoint=True)
        codes.flat[:2] = spec.qmin, spec.qmax
        kernel = jnp.asarray(codes, weights.dtype)
        layer = dataclasses.replace(layer, kernel=kernel, weights=weights)
        bias_type = jnp.int32 if layer.has_integer_accumulator else jnp.float32
        return dataclasses.replace(layer, bias=layer.bias.astype(bias_type))

    layers = {name: change(layer) for name, layer in q.params["layers"].items()}
    return q._replace(params=q.params | {"layers": layers})


def assert_same(restored: qjax.Quantized, q: qjax.Quantized, x: Any) -> None:
    chex.assert_trees_all_equal(restored.params, q.params, strict=True)
    logits = q.apply_fn(q.params, x)
    chex.assert_trees_all_equal(restored.apply_fn(restored.params, x), logits, strict=True)
    assert restored.report == q.report
    assert str(restored.report) == str(q.report)


def file_of(artifact: Path, pattern: str) -> Path:
    """The one file of an artifact with that name."""
    [found] = artifact.glob(pattern)
    return found


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_round_trip(q: qjax.Quantized, saved: Path):
    assert_same(qjax.load(saved, network), q, X)
    assert sorted(saved.iterdir()) == [file_of(saved, name) for name in FILES]
    assert set(q.params["rest"]) == {"between/0", "between/1"}  # bfloat16 and int16 came back


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 17))
def test_codes_take_their_true_width(q, tmp_path: Path, bits: int, symmetric: bool, granularity):
    spec = qjax.QuantSpec(bits, symmetric, granularity, group_size=2)
    q = with_codes(q, spec)
    qjax.save(tmp_path / "artifact", q)
    restored = qjax.load(tmp_path / "artifact", network)
    chex.assert_trees_all_equal(restored.params, q.params, strict=True)
    stored = load_file(file_of(tmp_path / "artifact", FILES[1]))
    for name, layer in q.params["layers"].items():
        stream = stored[f"layers/{name}/kernel"]
        assert stream.nbytes == -(-layer.kernel.size * bits // 8)
        number = int.from_bytes(stream.tobytes(), "little")
        codes = [(number >> i * bits) % 2**bits + spec.qmin for i in range(layer.kernel.size)]
        assert codes == layer.kernel.reshape(-1).tolist()


def test_zero_points_that_are_all_zero_are_not_stored(q: qjax.Quantized, saved: Path):
    stored = load_file(file_of(saved, FILES[1]))
    for name, layer in q.params["layers"].items():
        for field in ("weights", "inputs", "outputs"):
            qparams = getattr(layer, field)
            if qparams is not None:
                is_stored = f"layers/{name}/{field}/zero_point" in stored
                assert is_stored == bool(jnp.any(qparams.zero_point != 0))


def nnx_linear() -> tuple[Any, Any]:
    graph, state = nnx.split(nnx.Linear(7, 3, rngs=nnx.Rngs(0)))
    return (lambda params, x: nnx.merge(graph, params)(x)), state


def equinox_linear() -> tuple[Any, Any]:
    return (lambda params, x: jax.vmap(params)(x)), eqx.nn.Linear(7, 3, key=jax.random.key(0))


@pytest.mark.parametrize("model", [nnx_linear, equinox_linear])
def test_other_pytrees_need_params(model: Any, tmp_path: Path):
    apply_fn, params = model()
    q = qjax.quantize(apply_fn, params, X, qjax.recipe(4, **CHEAP))
    qjax.save(tmp_path / "artifact", q)
    with pytest.raises(ValueError, match="`params` must be given .* Pass the float params"):
        qjax.load(tmp_path / "artifact", apply_fn)
    shapes = jax.eval_shape(lambda: params)
    assert_same(qjax.load(tmp_path / "artifact", apply_fn, shapes), q, X)


def test_shared_kernels_keep_their_own_scales(tmp_path: Path):
    [case] = [c for c in CASES if c.id == "shared_kernel"]
    per_group = qjax.QuantSpec(4, granularity="per_group", group_size=3)
    recipe = qjax.recipe(weights=per_group, **CHEAP)
    q = qjax.quantize(case.apply_fn, case.params, case.x, recipe)
    qjax.save(tmp_path / "artifact", q)
    restored = qjax.load(tmp_path / "artifact", case.apply_fn)
    assert set(restored.params["layers"]) == {"w", "w@1", "w@2"}
    assert_same(restored, q, case.x)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p | {"head": {0: p["head"][0].astype(jnp.bfloat16)}}, r"bfloat16\[5, 3\] at"),
        (lambda p: p | {"head": {0: p["head"][0].T}}, r"got float32\[3, 5\] at 'head/0'"),
        (lambda p: p | {"more": jnp.zeros(1)}, r"expected nothing, got float32\[1\] at 'more'"),
        (lambda p: {"head": p["head"]}, r"expected bfloat16\[1, 5\] at 'between/0', got float32"),
    ],
)
def test_other_params_are_refused(saved: Path, change: Any, match: str):
    with pytest.raises(ValueError, match=match):
        qjax.load(saved, network, change(make_params()))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-10]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    ],
    ids=["truncated", "empty", "flipped"],
)
def test_damaged_files_are_refused(saved: Path, name: str, damage: Any):
    file = file_of(saved, name)
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name} is missing, truncated or edited"):
        qjax.load(saved, network)


def test_an_edited_manifest_is_refused(saved: Path):
    edit(saved / "manifest.json", '"head"', '"tail"')
    with pytest.raises(ValueError, match="manifest.json is missing, truncated or edited"):
        qjax.load(saved, network)


def test_missing_arrays_are_refused(saved: Path):
    file_of(saved, FILES[1]).unlink()
    with pytest.raises(ValueError, match=r"model-\w+\.safetensors is missing"):
        qjax.load(saved, network)


def test_a_newer_format_is_refused(saved: Path):
    edit(saved / "manifest.json", '"version": 2', '"version": 3')
    with pytest.raises(ValueError, match="artifact format 3, and this qjax reads formats 1 and 2"):
        qjax.load(saved, network)


def test_foreign_directories_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"`path` must be .* has no manifest\.json"):
        qjax.load(tmp_path / "nowhere", network)
    for text in ('{"format": "other"}', "[]"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="is of another program"):
            qjax.load(tmp_path, network)


def test_values_that_jax_would_round_are_refused(q: qjax.Quantized, tmp_path: Path):
    rest = q.params["rest"] | {"between/0": np.full((1, 5), 0.1)}
    qjax.save(tmp_path / "artifact", q._replace(params=q.params | {"rest": rest}))
    with pytest.raises(ValueError, match="float64 values at 'rest/between/0'.*jax_enable_x64"):
        qjax.load(tmp_path / "artifact", network)


def test_an_older_artifact_is_replaced(q: qjax.Quantized, saved: Path):
    other = with_codes(q, qjax.QuantSpec(3))
    qjax.save(saved, other)
    chex.assert_trees_all_equal(qjax.load(saved, network).params, other.params, strict=True)
    assert list(saved.parent.iterdir()) == [saved]


def test_an_empty_directory_is_used(q: qjax.Quantized, tmp_path: Path):
    qjax.save(tmp_path, q)
    assert sorted(tmp_path.iterdir()) == [file_of(tmp_path, name) for name in FILES]


def test_anything_else_is_not_replaced(q: qjax.Quantized, saved: Path, tmp_path: Path):
    (saved / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}")
    for path in (saved, tmp_path / "file", tmp_path / "model"):
        before = {p: p.is_file() and p.read_bytes() for p in (path, *path.glob("*"))}
        with pytest.raises(ValueError, match="`path` must be new, empty or an artifact"):
            qjax.save(path, q)
        assert before == {p: p.is_file() and p.read_bytes() for p in (path, *path.glob("*"))}


def test_a_failed_save_leaves_the_older_artifact(q, saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever of its files cannot be written; where there was none, there is none then."""
    before = sorted(saved.iterdir())
    for written in range(2):
        results = iter([None] * written)

        def sync(descriptor: int, results: Any = results) -> None:
            try:
                next(results)
            except StopIteration:
                raise OSError("disk full") from None

        monkeypatch.setattr(os, "fsync", sync)
        for path in (saved, saved.with_name("new")):
            with pytest.raises(OSError, match="disk full"):
                qjax.save(path, with_codes(q, qjax.QuantSpec(3)))
        assert list(saved.parent.iterdir()) == [saved]
        assert sorted(saved.iterdir()) == before
    assert_same(qjax.load(saved, network), q, X)


def test_what_killed_saves_left_is_swept(q: qjax.Quantized, saved: Path):
    """Also a folder without a manifest, and what an older qjax left next to the artifact."""
    hexadecimal = "0123456789abcdef" * 2
    left = {
        saved / f".{hexadecimal}.qjax": "half",
        saved / "model-0123456789abcdef.safetensors": "half",
        saved.with_name("new") / f".{hexadecimal}.qjax": "half",
        saved.with_name(f".artifact.{hexadecimal}") / f".{hexadecimal}.qjax": "half",
    }
    for file, text in left.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (saved.parent / ".artifact.notes").write_text("mine")
    for path in (saved, saved.with_name("new")):
        qjax.save(path, q)
        assert_same(qjax.load(path, network), q, X)
        assert sorted(path.iterdir()) == [file_of(path, name) for name in FILES]
    names = sorted(entry.name for entry in saved.parent.iterdir())
    assert names == [".artifact.notes", "artifact", "new"]


def test_the_directory_that_one_is_in(q: qjax.Quantized, saved: Path, monkeypatch):
    monkeypatch.chdir(saved)
    other = with_codes(q, qjax.QuantSpec(3))
    qjax.save(".", other)
    assert sorted(entry.name for entry in Path(".").iterdir()) == sorted(os.listdir(saved))
    chex.assert_trees_all_equal(qjax.load(".", network).params, other.params, strict=True)


def test_a_load_that_a_save_overtakes_starts_again(q, saved: Path, monkeypatch):
    other = with_codes(q, qjax.QuantSpec(3))
    read, overtaking = Path.read_bytes, iter([other])

    def read_bytes(file: Path) -> bytes:
        data = read(file)
        for late in overtaking:
            qjax.save(saved, late)
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    chex.assert_trees_all_equal(qjax.load(saved, network).params, other.params, strict=True)


def test_an_artifact_of_the_first_format(tmp_path: Path):
    """Its arrays bit for bit, and replaced by one of today."""
    older = Path(__file__).with_name("artifact_1")
    restored = qjax.load(older, network)
    arrays = load_file(older / "model.safetensors")
    shutil.copytree(older, tmp_path / "artifact")
    qjax.save(tmp_path / "artifact", restored)
    again = load_file(file_of(tmp_path / "artifact", FILES[1]))
    assert {name: (a.dtype, a.tolist()) for name, a in again.items()} == {
        name: (a.dtype, a.tolist()) for name, a in arrays.items()
    }
    assert_same(qjax.load(tmp_path / "artifact", network), restored, X)
    assert len(list((tmp_path / "artifact").iterdir())) == 2


def test_manifest_is_plain_json(q: qjax.Quantized, saved: Path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    manifest = json.loads((saved / "manifest.json").read_text(), parse_constant=refuse)
    assert qjax.Recipe.from_json(manifest["recipe"]) == q.report.recipe
    assert manifest["layers"]["head"]["weights"] == [-3, 3]
    assert manifest["report"][0]["weight_sqnr_db"] is None
    assert manifest["params"][2] == ["first/0", [7, 5], "float32"]


def test_ranges_at_run_time_are_saved(tmp_path: Path):
    """They have no arrays: all of them stands in the manifest."""
    spec = qjax.QuantSpec(6, False, "per_example", ranges="dynamic", scale="power_of_two")
    recipe = qjax.recipe(8, **CHEAP | {"inputs": spec, "outputs": spec})
    q = qjax.quantize(network, make_params(), X, recipe)
    qjax.save(tmp_path / "model", q)
    again = qjax.load(tmp_path / "model", network)
    chex.assert_trees_all_equal(again.params, q.params, strict=True)
    assert jax.tree.structure(again.params) == jax.tree.structure(q.params)
    assert again.report == q.report
    chex.assert_trees_all_equal(
        again.apply_fn(again.params, X), q.apply_fn(q.params, X), strict=True
    )
    stored = load_file(file_of(tmp_path / "model", FILES[1]))
    assert not any("inputs" in name or "outputs" in name for name in stored)


def test_a_name_in_the_hugging_face_hub(q: qjax.Quantized, saved: Path, monkeypatch):
    """There is no network here: what is asked for is checked, and what comes back is loaded."""
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = sorted(allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(qjax.load("someone/a-model.v1", network), q, X)
    assert asked == {"someone/a-model.v1": sorted([*FILES, "model.safetensors"])}
    monkeypatch.chdir(saved.parent.parent)
    local = str(saved.relative_to(saved.parent.parent))
    assert_same(qjax.load(local, network), q, X)
    assert local not in asked


def test_a_hub_that_cannot_be_read(monkeypatch):
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise FileNotFoundError("no such model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="`path` a/b is no directory here, and .* no such model"):
        qjax.load("a/b", network)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="`path` a/b .*; .* pip install huggingface_hub"):
        qjax.load("a/b", network)


@pytest.mark.parametrize("hold", [lambda params: params, qjax.pack])
def test_orbax_keeps_codes_and_static_fields(q: qjax.Quantized, tmp_path: Path, hold: Any):
    params = hold(q.params)
    exported = export.export(jax.jit(lambda params: params["layers"]["head"].bias))(params)
    written = exported.serialize()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
    # As another process does it, which has the exported function and nothing else.
    read = export.deserialize(written)
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in read.in_avals]
    (like,), _ = jax.tree.unflatten(read.in_tree, shapes)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "params", like)
    chex.assert_trees_all_equal(restored, params, strict=True)
    assert jax.tree.structure(restored) == jax.tree.structure(params)


def test_the_manifest_names_what_sums_depend_on(tmp_path: Path):
    q = small.quantized()
    qjax.save(tmp_path / "artifact", q)
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    environment = manifest["environment"]
    assert environment.keys() == {"cores", "device", "machine"}
    assert 1 <= environment["cores"] <= (os.cpu_count() or 1)
    assert environment["device"] == jax.devices()[0].device_kind
