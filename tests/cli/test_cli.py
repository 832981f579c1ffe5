"""The command line: what it prints, what it writes, and that bad input ends it with one reason."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretrained
import qjax
from pretrained import datasets
from qjax.cli.main import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantize.py"
CHEAP = ["--range-method", "absmax", "--no-bias-correction", "--input-bits", "float"]


class Model(NamedTuple):
    """A stand-in for what `pretrained.load` returns."""

    name: str
    apply_fn: Any
    params: Any
    preprocess: Any
    dataset: str


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"]["w"])
    return x @ params["head"]["w"]


def make_params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (16, 8), "head": (8, 10)}
    return {name: {"w": jnp.float32(rng.normal(size=s))} for name, s in shapes.items()}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """A model `tiny` of random weights, and for any dataset 40 training and 300 test images."""
    rng = np.random.default_rng(0)
    sizes = {"train": 40, "test": 300}
    images = {split: rng.integers(0, 255, (n, 4, 4, 1), np.uint8) for split, n in sizes.items()}
    tiny = Model("tiny", apply_fn, make_params(), lambda x: np.float32(x) / 255, "noise")
    models = {"tiny": tiny}
    load_model, load_dataset = pretrained.load, datasets.load

    def load(name: str, split: str) -> datasets.Dataset:
        if name != "noise":
            return load_dataset(name, split)
        x = tiny.preprocess(images[split])
        labels = np.array(apply_fn(tiny.params, x).argmax(-1), np.int32)
        labels[: len(labels) // 4] = 10  # a quarter is wrong
        return datasets.Dataset(images[split], labels, name)

    monkeypatch.setattr(pretrained, "load", lambda name: models.get(name) or load_model(name))
    monkeypatch.setattr(datasets, "load", load)
    return models


def quantize(*options: str) -> int:
    return main(["quantize", "--model", "tiny", *CHEAP, *options])


def test_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "artifact"
    options = ["--bits", "4", "--output-bits", "none", "--override", "hid*=12", "--json"]
    assert quantize(*options, "--calibration-size", "30", "--seed", "1", "--out", str(out)) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""  # no terminal, no bars
    *lines, last = stdout.splitlines()
    assert max(map(len, lines)) <= 100
    result = json.loads(last)
    assert result["float_top1"] == 75.0
    assert 0.0 <= result["quantized_top1"] <= 75.0
    assert [layer["weight_bits"] for layer in result["layers"]] == [12, 4]
    assert [layer["input_bits"] for layer in result["layers"]] == [None, None]
    assert (result["calibration_images"], result["test_images"], result["seed"]) == (30, 300, 1)
    assert result["bytes_float"] == 4 * (16 * 8 + 8 * 10)
    assert result["bytes_quantized"] < result["bytes_float"]
    assert set(result["versions"]) == {"qjax", "jax", "numpy", "python"}

    recipe = qjax.Recipe.from_json(result["recipe"])
    assert (recipe.inputs, recipe.outputs, recipe.range_method) == (None, None, "absmax")
    restored = qjax.load(out, apply_fn)
    assert restored.report.recipe == recipe
    assert stdout.startswith(str(restored.report))
    assert f"75.00 % float, {result['quantized_top1']:.2f} % quantized" in stdout
    assert "300 test images of noise" in stdout

    images = datasets.calibration_draw(datasets.load("noise", "train").images, 30, 1)
    same = qjax.quantize(apply_fn, make_params(), np.float32(images) / 255, recipe)
    assert same.report == restored.report  # nothing that a library call would not do


def test_json_counts_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert quantize("--json", "--out", str(tmp_path), "--first-last-bits", "3") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    arrays = manifest["arrays"].values()
    sizes = [np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in arrays]
    assert result["bytes_quantized"] == sum(sizes)
    assert result["calibration_images"] == 40  # all there are, below the default
    assert {layer["weight_bits"] for layer in result["layers"]} == {3}


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_on_a_terminal_unless_quiet(
    quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert quantize(*["--quiet"] * quiet) == 0
    stdout, stderr = capsys.readouterr()
    for stage in ("loading", "quantizing", "evaluating float", "evaluating quantized"):
        assert (stage in stderr) is not quiet
    assert "2 layers" in stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "nope"], "nope"),
        (["--bits", "1"], "`bits` must be an integer from 2 to 16; got 1"),
        (["--bits", "17"], "`bits` must be an integer from 2 to 16; got 17"),
        (["--bits", "many"], "argument --bits: invalid int value: 'many'"),
        (["--weight-bits", "0"], "`weight_bits` must be an integer from 2 to 16; got 0"),
        (["--output-bits", "half"], "--output-bits: expected a number of bits or float"),
        (["--first-last-bits", "99"], "`first_last_bits` must be an integer from 2 to 16; got 99"),
        (["--range-method", "guess"], "--range-method: invalid choice: 'guess'"),
        (["--calibration-size", "0"], "--calibration-size: expected at least 1 image; got '0'"),
        (["--calibration-size", "41"], "between 1 and 40"),
        (["--override", "hidden"], "--override: expected PATTERN=N or PATTERN=float"),
        (["--override", "hidden=1"], "`bits` must be an integer from 2 to 16; got 1"),
        (["--override", "conv*=4"], "`overrides` pattern 'conv*' matches no layer; the layers are"),
        (["--dataset", "digits:nope"], "digits:nope"),
        (["--out", "/dev/null/artifact"], "/dev/null"),
        (["--out", str(Path(__file__).parent)], "`path` must be new, empty or an artifact"),
        (["--model", "broken"], "`params` must be finite; found NaN or infinity at 'head/w'"),
        (["--model", "black"], "`batches` must be finite; found NaN or infinity"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--report", "/nowhere/report.html"], "`--report` must name a file in an existing folder"),
        (
            ["--search-bits", "0"],
            "`--search-bits` must be above 0 and at most 100 percent; got 0.0",
        ),
    ],
)
def test_bad_input_is_refused_with_one_reason(
    options: list[str],
    reason: str,
    stand_ins: dict[str, Model],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    tiny = stand_ins["tiny"]
    params = tiny.params | {"head": {"w": tiny.params["head"]["w"].at[0, 0].set(jnp.nan)}}
    stand_ins["broken"] = tiny._replace(params=params)
    stand_ins["black"] = tiny._replace(preprocess=lambda x: np.float32(x) * np.float32(np.nan))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert quantize(*options) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("qjax: error: ") and reason in stderr
    assert stderr.count("\n") == 1


def test_the_destination_is_checked_before_the_work(tmp_path: Path, monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("loaded a model first")

    monkeypatch.setattr(pretrained, "load", fail)
    (tmp_path / "notes.txt").write_text("mine")
    assert quantize("--out", str(tmp_path)) == 2


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    for option in ("--bits", "--rounding", "--override", "--out", "--json", "--quiet"):
        assert option in text


def test_explain_follows_a_layer(capsys: pytest.CaptureFixture[str]):
    options = ["--model", "tiny", *CHEAP[:3], "--image", "7", "--ranges", "--bits", "5"]
    assert main(["explain", "hidden", *options]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == "" and max(map(len, stdout.splitlines())) <= 100
    assert stdout.startswith("hidden: dense 16×8, activation relu\n")
    for part in ("input codes", "accumulator", "requantization", "de-quantization"):
        assert part in stdout
    for tensor in ("weights", "input", "output"):
        assert f"the range of the {tensor}, 5 bits" in stdout
    assert stdout.count("  best") == 3


def test_study_answers_a_question(capsys: pytest.CaptureFixture[str]):
    assert main(["study", "weight-bits", "--model", "tiny", *CHEAP, "--widths", "3", "12"]) == 0
    stdout = capsys.readouterr().out
    rows = [line.split() for line in stdout.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["3", "12"]
    assert rows[1][1:3] == ["75.00", "100.0"], "12 bits are as good as float"
    assert "300 test images of noise" in stdout and "40 calibration images" in stdout


def test_explain_and_study_draw_a_page(tmp_path: Path):
    path = tmp_path / "page.html"
    options = ["--model", "tiny", *CHEAP[:3], "--report", str(path)]
    assert main(["explain", "hidden", *options]) == 0
    drawn = path.read_text()
    assert "<h1>tiny, hidden: how the ranges were found</h1>" in drawn
    assert drawn.count("<svg") == 3 and drawn.count('class="curve output_mse"') == 3
    assert main(["study", "weight-bits", *options, "--widths", "3", "12"]) == 0
    drawn = path.read_text()
    assert drawn.count("<tr>") == 4 and drawn.count('style="width: 75.00%"') >= 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["study", "symmetry", "--report", "no/page.html"], "`--report` must name a file"),
        (["explain", "head", "--report", "no/page.html"], "`--report` must name a file"),
        (["explain", "stem"], "`LAYER` must be one of hidden, head; got 'stem'"),
        (["explain", "head", "--image", "300"], "`--image` must be from 0 to 299; got 300"),
        (["study", "everything"], "argument NAME: invalid choice: 'everything'"),
        (
            ["study", "weight-bits", "--widths", "1"],
            "`bits` must be an integer from 2 to 16; got 1",
        ),
    ],
)
def test_a_command_says_what_is_wrong(
    command: list[str], reason: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*command, "--model", "tiny"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and reason in stderr


def test_report_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "report.html"
    assert quantize("--report", str(path), "--bits", "6", "--json") == 0
    stdout = capsys.readouterr().out
    assert f"page         {path}" in stdout
    result = json.loads(stdout.splitlines()[-1])
    page = path.read_text()
    assert page.startswith("<!doctype html>") and "tiny, quantized" in page
    assert f"{result['bytes_float']:,} → {result['bytes_quantized']:,} bytes" in page
    assert f"{result['quantized_top1']:.2f} %" in page


def test_scales_per_channel_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "report.html"
    formats = ["--input-bits", "6", "--output-bits", "float"]
    options = [*formats, "--activation-granularity", "per_channel", "--json"]
    assert quantize(*options, "--report", str(path)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recipe"]["inputs"]["granularity"] == "per_channel"
    finer = 4 * (16 + 8)  # bytes of the scales of both inputs
    assert quantize(*formats, "--json") == 0
    coarser = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bytes_quantized"] == coarser["bytes_quantized"] + finer - 2 * 4
    assert "tiny, quantized" in path.read_text()


def test_search_bits_starts_low(capsys: pytest.CaptureFixture[str]):
    assert quantize("--search-bits", "90", "--json") == 0
    stdout = capsys.readouterr().out
    rows = stdout[: stdout.index("layer ")].splitlines()
    tried = [int(line.split()[0]) for line in rows if line[:1].isdigit()]
    result = json.loads(stdout.splitlines()[-1])
    assert tried == list(range(2, 2 + len(tried))) and 1 < len(tried) < 15
    assert {layer["weight_bits"] for layer in result["layers"]} == {tried[-1]}
    assert result["recipe"]["inputs"] is None


def test_the_script_is_the_same_command(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--bits", "40"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "`bits` must be an integer from 2 to 16; got 40" in capsys.readouterr().err


def test_top1_counts_every_image_once():
    labels = np.arange(10) % 3
    logits = np.eye(3, dtype=np.float32)[np.where(np.arange(10) < 7, labels, (labels + 1) % 3)]
    seen = []
    accuracy = qjax.top1(
        lambda params, x: x * params,
        jnp.ones((1, 1)),
        logits,
        labels,
        batch_size=4,
        progress=lambda item, done, total: seen.append((done, total)),
    )
    assert accuracy == pytest.approx(70.0)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(ValueError, match="got 10 images and 9 labels"):
        qjax.top1(lambda params, x: x, None, logits, labels[:9])


# ---- A width for every layer


def found_in(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What was printed, and the JSON of its last line."""
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_average_bits_gives_widths_that_can_be_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert quantize("--average-bits", "4.5", "--json") == 0
    out, result = found_in(capsys)
    assert "mean bits" in out
    widths = [layer["weight_bits"] for layer in result["layers"]]
    sizes = [np.prod(layer["kernel_shape"]) for layer in result["layers"]]
    assert np.average(widths, weights=sizes) <= 4.5
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    assert quantize("--recipe", str(file), "--json") == 0
    _, again = found_in(capsys)
    assert [layer["weight_bits"] for layer in again["layers"]] == widths
    assert again["quantized_top1"] == result["quantized_top1"]


def test_max_bytes_bounds_what_is_stored(capsys: pytest.CaptureFixture[str]):
    assert quantize("--json") == 0
    _, at_8_bits = found_in(capsys)
    budget = at_8_bits["bytes_quantized"] - 10
    assert quantize("--max-bytes", str(budget), "--json") == 0
    _, result = found_in(capsys)
    assert result["bytes_quantized"] <= budget
    assert quantize("--max-bytes", "3") == 2
    assert "`--max-bytes` must be at least" in capsys.readouterr().err


def test_target_drop_says_what_it_expects_to_lose(capsys: pytest.CaptureFixture[str]):
    assert quantize("--target-drop", "50", "--json") == 0
    out, result = found_in(capsys)
    assert "estimated loss of accuracy, without labels" in out
    assert result["layers"][0]["weight_bits"] == 2, "almost any loss is allowed"


def test_a_target_leaves_alone_what_overrides_give(capsys: pytest.CaptureFixture[str]):
    assert quantize("--target-drop", "50", "--override", "hid*=8", "--json") == 0
    _, result = found_in(capsys)
    assert [layer["weight_bits"] for layer in result["layers"]] == [8, 2]


def test_budgets_exclude_each_other(capsys: pytest.CaptureFixture[str]):
    assert quantize("--average-bits", "4", "--max-bytes", "9") == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", "not json"])
def test_a_file_without_a_recipe_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text(text)
    assert quantize("--recipe", str(tmp_path / "file")) == 2
    assert "`--recipe` must name a file with a recipe" in capsys.readouterr().err


def test_cost_prints_a_table(capsys: pytest.CaptureFixture[str]):
    assert quantize("--cost", "picojoules") == 0
    assert "energy (pJ)" in capsys.readouterr().out
