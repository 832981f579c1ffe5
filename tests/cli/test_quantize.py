"""`qjax quantize`: what it prints, what it writes, and that bad input ends it with one reason."""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cli.tiny import PIXELS, Model, apply_fn, make_params, quantize

import pretrained
import qjax
from pretrained import datasets
from qjax.cli.main import main


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
    same = qjax.quantize(apply_fn, make_params(), PIXELS(images), recipe)
    assert same.report == restored.report  # nothing that a library call would not do


def test_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kept, out = tmp_path / "kept", tmp_path / "artifact"
    options = ["--bits", "4", "--tune", "40", "--tune-size", "36", "--checkpoint", str(kept)]
    assert quantize(*options, "--out", str(out), "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["tuning"]
    assert found["steps"] == 40 and found["is_kept"]
    assert found["after"]["plain"] < found["before"]["plain"]
    [line] = [line for line in lines if line.startswith("tuning")]
    assert line.startswith("tuning       40 steps, divergence held out: plain 0.") and "→" in line
    assert not kept.exists()
    images = datasets.calibration_draw(datasets.load("noise", "train").images, 36, 0)
    restored = qjax.load(out, apply_fn)
    calibration = datasets.calibration_draw(datasets.load("noise", "train").images, 40, 0)
    q = qjax.quantize(apply_fn, make_params(), PIXELS(calibration), restored.report.recipe)
    same = qjax.tune(q, apply_fn, make_params(), PIXELS(images), steps=40)
    np.testing.assert_array_equal(
        same.params["layers"]["head"].bias, restored.params["layers"]["head"].bias
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "0"], "`--tune` must be at least 1 step; got 0"),
        (["--tune-size", "9"], "`--tune-size` is for tuning; add `--tune`, or leave it out"),
        (["--data-free", "--tune"], "`--data-free` has no images to tune on"),
        (["--end-search", "-1"], "`--end-search` must be at least 0; got -1"),
    ],
)
def test_tuning_that_is_not_possible(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert quantize(*options) == 2
    assert message in capsys.readouterr().err


def test_without_images(capsys: pytest.CaptureFixture[str]):
    dynamic = ["--input-bits", "8", "--activation-ranges", "dynamic"]
    assert quantize("--data-free", *dynamic, "--baseline", "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["calibration_images"] == 0 and result["quantized_top1"] > 70
    assert any(line.startswith("calibration") and "without images" in line for line in lines)
    assert {layer["output_sqnr_db"] for layer in result["layers"]} == {"unknown"}


def test_without_images_what_is_unknown_is_refused(capsys: pytest.CaptureFixture[str]):
    assert quantize("--data-free") == 2
    assert "nothing is known of the output of layer 'hidden'" in (found := capsys.readouterr().err)
    assert found.rstrip().endswith("Here: --activation-ranges dynamic, or --output-bits float.")
    assert quantize("--data-free", "--search-bits") == 2
    assert "`--data-free` has no images to choose widths on" in capsys.readouterr().err


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
        (["--bits", "0"], "`--bits` must be an integer from 1 to 16; got 0"),
        (["--bits", "17"], "`--bits` must be an integer from 1 to 16; got 17"),
        (["--bits", "many"], "argument --bits: invalid int value: 'many'"),
        (["--weight-bits", "0"], "`--weight-bits` must be an integer from 1 to 16; got 0"),
        (["--output-bits", "half"], "--output-bits: expected a number of bits or float"),
        (
            ["--first-last-bits", "99"],
            "`--first-last-bits` must be an integer from 1 to 16; got 99",
        ),
        (["--range-method", "guess"], "--range-method: invalid choice: 'guess'"),
        (["--weight-format", "octal"], "--weight-format: invalid choice: 'octal'"),
        (["--weight-format", "nf4"], "`--bits` must be 4 in the format nf4; got 8"),
        (["--calibration-size", "0"], "--calibration-size: expected at least 1 image; got '0'"),
        (["--calibration-size", "41"], "between 1 and 40"),
        (["--override", "hidden"], "--override: expected PATTERN=N or PATTERN=float"),
        (["--override", "hidden=0"], "--override: expected a width from 1 to 16 bits; got '0'"),
        (
            ["--override", "conv*=4"],
            "`--override` pattern 'conv*' matches no layer; the",
        ),
        (["--dataset", "digits:nope"], "digits:nope"),
        (["--out", "/dev/null/artifact"], "/dev/null"),
        (["--out", str(Path(__file__).parent)], "`--out` must be new, empty or an artifact"),
        (
            ["--model", "broken"],
            "the params of `--model` must be finite; found NaN or infinity at",
        ),
        (["--model", "black"], "the images of `--dataset` must be finite; found NaN or infinity"),
        (
            ["--dataset", "digits"],
            "`--dataset` digits has images of shape (8, 8, 1), which the model",
        ),
        (
            ["--fixed-point", "--activation-granularity", "per_channel"],
            "must be per_tensor with `--fixed-point` and `--activation-ranges` static; got per_ch",
        ),
        (
            ["--activation-ranges", "dynamic", "--activation-granularity", "per_channel"],
            "`--activation-granularity` must be per_tensor or per_example with "
            "`--activation-ranges` dynamic; got per_channel",
        ),
        (
            ["--activation-granularity", "per_example"],
            "`--activation-granularity` must be per_tensor or per_channel with "
            "`--activation-ranges` static; got per_example",
        ),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--seed", "-1"], "--seed: expected an integer from 0 on; got '-1'"),
        (["--average-bits", "4", "--bits", "3"], "`--average-bits` finds what `--bits` would give"),
        (["--search-bits", "--weight-bits", "3"], "`--search-bits` finds what `--weight-bits`"),
        (["--max-bytes", "900", "--weight-bits", "3"], "`--max-bytes` finds what `--weight-bits`"),
        (["--report", "/dev/full"], "`--report` must name a file that can be written"),
        (["--report", "r" * 300], "File name too long"),
        (["--report", "a\0b"], "embedded null"),
        (["--report", "x", "--out", "x"], "`--out` and `--report` must name places apart"),
        (["--report", "x", "--export", "./x"], "`--report` and `--export` must name places apart"),
        (["--data-free", "--calibration-size", "9"], "leave out `--calibration-size`"),
        (
            ["--report", "/nowhere/report.html"],
            "`--report` must name a file that can be written",
        ),
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
    assert not Path("x").exists()


def test_the_destination_is_checked_before_the_work(tmp_path: Path, monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("loaded a model first")

    monkeypatch.setattr(pretrained, "load", fail)
    (tmp_path / "notes.txt").write_text("mine")
    assert quantize("--out", str(tmp_path)) == 2


def test_what_fails_at_the_end_leaves_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(qjax.artifact, "save", fail)
    assert quantize("--out", str(tmp_path / "new"), "--json") == 2
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout.splitlines()[-1])["float_top1"] == 75.0
    assert stderr == "qjax: error: disk full\n"


def test_names_move_no_cursor(
    stand_ins: dict[str, Model], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tiny = stand_ins["tiny"]
    name = "clear\x1b[2J"
    params = {name: tiny.params["hidden"], "head": tiny.params["head"]}

    def apply(params: Any, x: Any) -> Any:
        return apply_fn({"hidden": params[name], "head": params["head"]}, x)

    stand_ins["tiny"] = tiny._replace(apply_fn=apply, params=params)
    assert quantize() == 0
    assert "clear\\x1b[2J" in (stdout := capsys.readouterr().out) and "\x1b" not in stdout
    assert quantize("--override", f"{name}x=4") == 2
    assert "\x1b" not in capsys.readouterr().err


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


def test_cost_prints_a_table(capsys: pytest.CaptureFixture[str]):
    assert quantize("--cost", "picojoules") == 0
    assert "energy (pJ)" in capsys.readouterr().out


def test_fixed_point_is_asked_for_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert quantize("--fixed-point", "--json", "--out", str(tmp_path)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recipe"]["weights"]["scale"] == "power_of_two"
    scales = [layer["output_scale"] for layer in result["layers"]]
    assert [np.frexp(scale)[0] for scale in scales] == [0.5, 0.5]
    assert qjax.load(tmp_path, apply_fn).report.recipe.weights.scale == "power_of_two"


def test_ranges_at_run_time_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--activation-ranges", "dynamic", "--activation-granularity", "per_example"]
    page = tmp_path / "page.html"
    command = ["quantize", "--model", "tiny", "--range-method", "absmax", "--sweeps", "0"]
    given = [*command, *options, "--out", str(tmp_path / "model"), "--report", str(page)]
    assert main([*given, "--cost", "bits"]) == 0
    stdout = capsys.readouterr().out
    assert "8/8d/–" in stdout and "d: dynamic, the range is found at run time" in stdout
    assert "8/8d/–" in page.read_text()
    layers = qjax.load(tmp_path / "model", apply_fn).params["layers"]
    assert {layer.inputs.axis for layer in layers.values()} == {0}
