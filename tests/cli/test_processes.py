"""`--coordinator` and `--memory`: what goes together, and what does not."""

import json
from typing import Any

import pytest
from cli.tiny import quantize

MEET = ["--coordinator", "localhost:9", "--processes", "2", "--process", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "`--processes` needs `--coordinator`; add it, or leave both out"),
        (["--process", "0"], "`--process` needs `--coordinator`"),
        (["--coordinator", "here"], "`--coordinator` must be HOST:PORT or auto; got 'here'"),
        (MEET[:4], "`--coordinator` needs `--processes` and `--process`; add them"),
        ([*MEET[:5], "2"], "`--process` must be from 0 to below `--processes`; got 2"),
        (["--coordinator", "auto", "--process", "1"], "leave out `--processes` and `--process`"),
        ([*MEET, "--tune"], "`--tune` runs in one process; leave it out, or `--coordinator`"),
        ([*MEET, "--average-bits", "4"], "`--average-bits` runs in one process"),
        ([*MEET, "--data-free"], "`--data-free` runs in one process"),
        (["--memory", "host", "--search-bits"], "`--search-bits` quantizes many times, and"),
        (["--memory", "host", "--data-free"], "takes no images; leave out `--memory`"),
        (["--memory", "cloud"], "invalid choice: 'cloud' (choose from"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, capsys: Any):
    assert quantize(*options) == 2
    assert message in capsys.readouterr().err


def test_memory(capsys: pytest.CaptureFixture[str]):
    results = []
    for options in ([], ["--memory", "disk"], ["--memory", "recompute"]):
        assert quantize(*options, "--json") == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["layers"])
    for found in results[1:]:
        for layer, expected in zip(found, results[0], strict=True):
            assert layer["weight_sqnr_db"] == pytest.approx(expected["weight_sqnr_db"], rel=1e-5)
            assert layer["output_sqnr_db"] == pytest.approx(expected["output_sqnr_db"], rel=1e-5)
