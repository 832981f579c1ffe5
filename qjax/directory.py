"""A directory that holds an artifact: a manifest, and the arrays that it names.

The arrays of another artifact have another name, that of their SHA-256, so that renaming the
manifest replaces one artifact by the other. Hashes tell of accidents; who changes a file on purpose
changes the hash too. Nothing that is read is ever executed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from qjax import atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT, VERSION = "qjax", 2
READABLE = (1, 2)  # versions; 1 has no fingerprint of the function
MANIFEST, ARRAYS = "manifest.json", "model-{}.safetensors"
PATTERNS = (MANIFEST, ARRAYS.format("*"), "model.safetensors")

_OLDER_ARRAYS = "model.safetensors"  # of version 1
_OURS = re.compile(
    rf"{re.escape(MANIFEST)}|model(-[0-9a-f]{{16}})?\.safetensors|{atomic.TEMPORARY.pattern}"
)


class Files(NamedTuple):
    """What an artifact consists of.

    Attributes:
      manifest: its file.
      entries: what that says, without its hashes.
      arrays: the file of the arrays.
      data: that file's bytes.
    """

    manifest: Path
    entries: dict[str, Any]
    arrays: Path
    data: bytes


def check_destination(path: str | os.PathLike[str]) -> None:
    """Checks that `save` can write to a directory, without leaving anything in it.

    Args:
      path: the directory, which need not exist; its parents are made.

    Raises:
      ValueError: `path` holds something else than an artifact.
      OSError: `path` cannot be written.
    """
    path = Path(path).resolve()
    if not (_is_ours(path) if path.is_dir() else not path.exists()):
        raise ValueError(
            f"`path` must be new, empty or an artifact of qjax.save; {path} holds something else. "
            "Choose another path, or remove it first."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = atomic.temporary(path if path.is_dir() else path.parent)
    probe.touch()
    probe.unlink()


def write(path: Path, entries: dict[str, Any], data: bytes) -> None:
    """Writes both files: the arrays by a name of their own, then the manifest that names them.

    Who reads meanwhile finds the older artifact until the manifest has changed, and so does
    everybody if this is killed before. Others who save there wait.
    """
    about = {"format": FORMAT, "version": VERSION} | entries
    digest = hashlib.sha256(data).hexdigest()
    arrays = ARRAYS.format(digest[:16])
    digests = {arrays: digest, MANIFEST: _digest_of(about)}
    text = json.dumps(about | {"sha256": digests}, indent=1, allow_nan=False)
    is_new = not path.exists()
    path.mkdir(exist_ok=True)
    with _alone(path):
        try:
            atomic.write(path / arrays, data)
            atomic.write(path / MANIFEST, text)
        finally:
            _sweep(path)
            if is_new and not any(path.iterdir()):
                path.rmdir()
    atomic.sync(path.parent)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until nobody else is in this context for a folder; a process that ends leaves it."""
    if fcntl is None:  # there is no such lock on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # nor on some file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Removes what earlier saves left: all of it but the manifest and the arrays that it names."""
    kept = {MANIFEST, *_digests(path)}
    for entry in path.iterdir():
        if entry.name not in kept and _OURS.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
    # Folders that an older qjax left next to the artifact when it was killed.
    for entry in path.parent.iterdir():
        is_left = re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}", entry.name)
        if is_left and entry.is_dir() and _is_ours(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _digests(path: Path) -> Mapping[str, str]:
    """The SHA-256 of the files of an artifact, by name; nothing if there is none."""
    try:
        return json.loads((path / MANIFEST).read_bytes())["sha256"]
    except FileNotFoundError:
        return {}


def _is_ours(path: Path) -> bool:
    """Whether a folder holds an artifact, what was left of one, or nothing."""
    names = {entry.name for entry in path.iterdir()}
    is_whole = _is_artifact(path) if MANIFEST in names else _OLDER_ARRAYS not in names
    return is_whole and all(_OURS.fullmatch(name) for name in names)


def read(path: Path, attempts: int = 10) -> Files:
    """Reads and checks both files.

    Args:
      path: the directory.
      attempts: where another process replaces the artifact meanwhile.

    Raises:
      ValueError: it holds no artifact, or one that is damaged or of a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"`path` must be a directory that qjax.save wrote; {path} has no {MANIFEST}."
        )
    try:
        entries = json.loads(file.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _changed(file) from error
    if not _is_manifest(entries):
        raise ValueError(
            f"`path` must be a directory that qjax.save wrote; {file} is of another program."
        )
    version = entries.get("version")
    if type(version) is not int or version not in READABLE:
        raise ValueError(
            f"{path} has artifact format {version!r:.40}, and this qjax reads formats "
            f"{' and '.join(map(str, READABLE))}; load it with the qjax that wrote it, or a newer "
            "one (pip install -U qjax)."
        )
    digests = entries.pop("sha256", None)
    if not isinstance(digests, dict) or digests.pop(MANIFEST, None) != _digest_of(entries):
        raise _changed(file)
    [(name, digest)] = digests.items() if len(digests) == 1 else [("", "")]
    if name != (_OLDER_ARRAYS if version == 1 else ARRAYS.format(str(digest)[:16])):
        raise damaged(file, "sha256", "it must name the manifest and one file of arrays")
    try:
        data = (path / name).read_bytes()
    except FileNotFoundError:
        if attempts > 1:  # a save has put others in their place
            return read(path, attempts - 1)
        raise _changed(path / name) from None
    if digest != hashlib.sha256(data).hexdigest():
        raise _changed(path / name)
    return Files(file, entries, path / name, data)


def damaged(file: Path, entry: str, reason: object) -> ValueError:
    """The error for an entry of a file that says nothing of use."""
    where = f" at {entry!r}" if entry else ""
    reason = " ".join(str(reason).split())[:200]
    return ValueError(
        f"{file} is damaged{where}: {reason}. Copy it again, or quantize and save again."
    )


def _changed(file: Path) -> ValueError:
    return ValueError(
        f"{file} is missing, truncated or edited (its SHA-256 is not the one that was saved); copy "
        "it again, or quantize and save again."
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _digest_of(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _is_manifest(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _is_artifact(path: Path) -> bool:
    try:
        return _is_manifest(json.loads((path / MANIFEST).read_bytes()))
    except (OSError, ValueError):
        return False
