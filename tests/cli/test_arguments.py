"""The options that commands share."""

from pathlib import Path

import pytest
from cli.tiny import quantize


@pytest.mark.parametrize("text", ["[]", "{}", "not json"])
def test_a_file_without_a_recipe_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text(text)
    assert quantize("--recipe", str(tmp_path / "file")) == 2
    assert "`--recipe` must name a file with a recipe" in capsys.readouterr().err
