"""Artifacts whose hashes are right and whose content is not: refused, or of use as they are."""

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save

import qjax
from qjax import directory

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "reliability_artifacts.py"))
network = SCRIPT["mixed_network"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "artifact"
    qjax.save(path, SCRIPT["mixed"]())
    return path


@pytest.fixture
def files(saved: Path, tmp_path: Path) -> directory.Files:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return directory.read(tmp_path)


@pytest.mark.parametrize(("group", "count"), [("damaged_manifests", 100), ("damaged_arrays", 60)])
def test_damage_that_hashes_do_not_tell(group: str, count: int):
    cases = list(SCRIPT[group](count, seed=0))
    assert not [case.failure for case in cases if case.failure]
    assert len(cases) == count and sum(case.was_refused for case in cases) > count / 2


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("layers|head|kernel_shape", [1, 16, 10**9], r"'layers/head'.*6,000,000,000 bytes hold"),
        ("layers|head|outputs", [0, 29], "'layers/head'.*outputs must have all codes of a width"),
        ("layers|head|inputs", None, "'arrays/layers/head/inputs/scale'.*belongs to nothing"),
        ("layers", [], "'layers' must be a dict"),
        ("arrays|layers/head/bias", ["int32", [10**12]], "'arrays/layers/head/bias'.*is missing"),
        ("arrays|layers/head/bias", ["object", [4]], "'arrays/layers/head/bias'.*no type"),
        ("recipe|sweeps", 1.5, "'recipe': `sweeps` must be an integer; got 1.5"),
        ("recipe|later", 1, "'recipe'.*later"),
        ("report", [{}], "'report/0'.*missing"),
        ("structure", {"dict": [["gain", 7]]}, "'structure'.*IndexError"),
        ("skipped", [1], "'skipped/0'"),
        ("more", 1, "'more': it is not what was saved"),
    ],
)
def test_an_entry_is_named(files: directory.Files, path: str, value: Any, match: str):
    *parents, last = path.split("|")
    entries: Any = files.entries
    for name in parents:
        entries = entries[name]
    entries[last] = value
    SCRIPT["rewrite"](files, json.dumps(files.entries), files.data)
    with pytest.raises(ValueError, match=rf"(json|safetensors) is damaged.*{match}"):
        qjax.load(files.manifest.parent, network)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("layers/head/weights/scale", lambda a: -a, "weights/scale must be .* positive"),
        ("layers/head/weights/scale", lambda a: a * np.nan, "weights/scale must be .* finite"),
        ("layers/head/inputs/zero_point", lambda a: a + 900, "zero_point must be an int32 code"),
        ("layers/head/kernel", lambda a: a | 255, "the kernel has a code beyond the 7"),
        ("layers/hidden/weights/levels", lambda a: a[..., ::-1], "levels must be .* ascending"),
        ("rest/gain", lambda a: a * np.inf, "'rest/gain': it holds NaN or infinity"),
        ("layers/hidden/bias", lambda a: a.astype(np.float64), "is stored as float64"),
    ],
)
def test_arrays_that_mean_nothing(files: directory.Files, name: str, change: Any, match: str):
    arrays = load(files.data)
    with np.errstate(invalid="ignore"):
        arrays[name] = np.ascontiguousarray(change(arrays[name]))
    SCRIPT["rewrite"](files, json.dumps(files.entries), save(arrays))
    with pytest.raises(ValueError, match=f"is damaged at .*{match}"):
        qjax.load(files.manifest.parent, network)


def test_a_missing_array_of_floats_is_refused(files: directory.Files):
    arrays = load(files.data)
    del arrays["layers/head/weights/scale"], arrays["rest/gain"]
    SCRIPT["rewrite"](files, json.dumps(files.entries), save(arrays))
    with pytest.raises(ValueError, match=r"'arrays/layers/head/weights/scale': .*is missing"):
        qjax.load(files.manifest.parent, network)


def test_another_function_is_refused(saved: Path):
    """Another activation with the same kernels, another constant, other layers."""
    of = {
        "relu6": lambda p, x: network_with(jax.nn.relu6, 1.0, p, x),
        "twice": lambda p, x: network_with(jax.nn.relu, 2.0, p, x),
    }
    same = jax.jit(lambda p, x: network_with(lambda y: jnp.maximum(y, 0), 1.0, p, x))
    q = qjax.load(saved, same)
    assert q.params["layers"].keys() == {"hidden", "middle", "head"}
    for other in of.values():
        with pytest.raises(ValueError, match=r"`apply_fn` must be .* fingerprint in .*json"):
            qjax.load(saved, other)
    with pytest.raises(ValueError, match=r"`apply_fn` must be .* it fails on .*shapes in .*json"):
        qjax.load(saved, lambda p, x: x @ p["head"])


def network_with(activation: Any, factor: float, params: Any, x: jax.Array) -> jax.Array:
    x = activation(x @ params["hidden"]) * params["gain"]
    x = x + x @ params["middle"]
    return (x if factor == 1 else x * factor) @ params["head"]


def test_a_function_that_another_jax_traced(files: directory.Files):
    files.entries["versions"]["jax"] = "0.1"
    SCRIPT["rewrite"](files, json.dumps(files.entries), files.data)
    qjax.load(files.manifest.parent, network)
    other = lambda p, x: network_with(jax.nn.relu6, 1.0, p, x)  # noqa: E731
    with pytest.warns(UserWarning, match=r"saved under jax 0.1, .* Check its accuracy"):
        qjax.load(files.manifest.parent, other)


def test_what_could_not_be_loaded_is_not_saved(saved: Path, tmp_path: Path):
    q = qjax.load(saved, network)
    q.params["layers"]["head"].weights.scale.block_until_ready()
    layers = jax.tree.map(lambda leaf: leaf * 0, q.params["layers"])
    with pytest.raises(ValueError, match="`q` cannot be saved: in layer 'hidden'|'middle'|'head'"):
        qjax.save(tmp_path / "artifact", q._replace(params=q.params | {"layers": layers}))
    assert not (tmp_path / "artifact").exists()
