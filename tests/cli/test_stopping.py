"""How a command ends before its time: a signal, a reader that leaves, a page that fails."""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from cli.tiny import Model, quantize

import pretrained
from qjax.page import quantization

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_a_signal_ends_a_command_with_one_line(
    number: signal.Signals,
    code: int,
    word: str,
    is_lost: bool,
    stand_ins: dict[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def load(name: str) -> Model:
        with contextlib.suppress(BaseException if is_lost else ()):
            signal.raise_signal(number)
        return stand_ins[name]

    monkeypatch.setattr(pretrained, "load", load)
    before = signal.getsignal(number)
    assert quantize("--out", str(tmp_path / "model")) == code
    assert capsys.readouterr() == ("", f"qjax: {word}\n")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


def test_a_reader_that_leaves_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert quantize("--quiet", "--out", str(tmp_path / "model")) == 0
    assert (tmp_path / "model" / "manifest.json").is_file()
    assert capsys.readouterr().err == ""


def test_a_terminal_without_the_characters_gets_question_marks(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert quantize() == 0
    sys.stdout.flush()
    assert b"???" in written.getvalue() and b"top-1" in written.getvalue()


def test_a_page_that_fails_costs_the_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(facts: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(quantization, "render", full)
    assert quantize("--quiet", "--json", "--report", str(tmp_path / "page.html")) == 2
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout.splitlines()[-1])["model"] == "tiny"
    assert stderr == "qjax: error: no space left on device\n"
