"""Files that are written whole or not at all, whatever stops the process or the machine."""

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path

# What a write that was killed may leave next to its file.
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.qjax")


def temporary(folder: Path) -> Path:
    """A new name in a folder, one of `TEMPORARY`."""
    return folder / f".{uuid.uuid4().hex}.qjax"


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file: who reads it finds the old content or the new one.

    The content goes to a new file next to it, to the disk, and then takes the file's name. A link
    stays one; a device or a pipe is written to as it is.

    Args:
      path: of the file, in a folder that exists.
      content: bytes, or a text that is written as UTF-8.

    Raises:
      OSError: it cannot be written; the file is as it was.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(f"{folder}/page.html", "old")
      ...     write(f"{folder}/page.html", "new")
      ...     Path(f"{folder}/page.html").read_text(), os.listdir(folder)
      ('new', ['page.html'])
    """
    file = Path(path).resolve()
    data = content.encode() if isinstance(content, str) else content
    if file.exists() and not file.is_file():
        file.write_bytes(data)
        return
    new = temporary(file.parent)
    try:
        with new.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    sync(file.parent)


def sync(folder: Path) -> None:
    """Brings the names in a folder to the disk, where its file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
