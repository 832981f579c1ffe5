"""Files written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

from qjax import atomic


def test_a_link_and_the_mode_stay(tmp_path: Path):
    file, link = tmp_path / "page.html", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    atomic.write(link, "new ∞")
    assert link.is_symlink() and file.read_text(encoding="utf-8") == "new ∞"
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "page.html"]


def test_a_device_is_written_to():
    atomic.write(os.devnull, b"gone")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch, name: str):
    """A full disk, or Ctrl-C."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr({"fsync": os, "replace": Path}[name], name, stop)
    with pytest.raises(KeyboardInterrupt):
        atomic.write(tmp_path / "page.html", "new")
    assert (tmp_path / "page.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("sync") or sync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda *names: done.append("name") or replace(*names))
    atomic.write(tmp_path / "page.html", "new")
    assert done == ["sync", "name", "sync"]
