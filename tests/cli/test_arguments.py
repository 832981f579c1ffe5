"""The options that commands share."""

import argparse
import json
from pathlib import Path

import pytest

import qjax
from qjax.cli.arguments import add_recipe, read_recipe
from qjax.cli.main import main

RECIPE = qjax.recipe(8).to_json()


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", "not json", "[" * 10**5, '{"recipe": []}'),
        json.dumps(RECIPE | {"sweeps": 1.5}),
        json.dumps(RECIPE | {"weights": 4}),
        json.dumps(RECIPE | {"overrides": 4}),
        json.dumps(RECIPE | {"inputs": {"bits": "8"}}),
    ],
    ids=lambda text: text[-9:],
)
def test_a_file_without_a_recipe_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text(text)
    assert main(["quantize", "--model", "tiny", "--recipe", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "`--recipe` must name a file with a recipe" in error and str(tmp_path) in error
    assert error.count("\n") == 1


def test_a_recipe_and_options_of_one_are_refused(capsys: pytest.CaptureFixture[str]):
    options = ["--bits", "4", "--no-sequential"]
    assert main(["quantize", "--model", "tiny", "--recipe", "file.json", *options]) == 2
    reason = "`--recipe` has all that `--bits`, `--no-sequential` would say; give one or the other."
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("option", [None, "--equalize", "--no-bias-correction", "--sweeps"])
def test_an_option_changes_one_field(option: str | None):
    """What is not given is left to `qjax.recipe`."""
    values = {"--sweeps": "7"}
    given = [] if option is None else [option, *filter(None, [values.get(option)])]
    parser = argparse.ArgumentParser()
    add_recipe(parser)
    changes = {
        None: {},
        "--equalize": {"equalize": True},
        "--no-bias-correction": {"bias_correction": False},
        "--sweeps": {"sweeps": 7},
    }
    assert read_recipe(parser.parse_args(given)) == qjax.recipe(8, **changes[option])
