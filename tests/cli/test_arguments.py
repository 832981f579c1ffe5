"""The options that commands share."""

import argparse
from pathlib import Path

import pytest

import qjax
from qjax.cli.arguments import add_recipe, read_recipe
from qjax.cli.main import main


@pytest.mark.parametrize("text", ["[]", "{}", "not json"])
def test_a_file_without_a_recipe_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text(text)
    assert main(["quantize", "--model", "tiny", "--recipe", str(tmp_path / "file")]) == 2
    assert "`--recipe` must name a file with a recipe" in capsys.readouterr().err


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
