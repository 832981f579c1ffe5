"""A self-contained HTML document: one file that fetches nothing."""

from html import escape
from importlib import resources
from pathlib import Path


def document(title: str, body: str) -> str:
    """Puts a body between the styles and the script that all documents share.

    Args:
      title: plain text.
      body: HTML.
    """
    template = resources.files("qjax.page").joinpath("page.html").read_text()
    return template.replace("{{title}}", escape(title)).replace("{{body}}", body)


def check_destination(path: str | None) -> None:
    """Refuses a path where no file can be written, before any work is done.

    Raises:
      ValueError: it is a folder, or its folder does not exist.
    """
    if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"`--report` must name a file in an existing folder; got {path!r}.")


def write(path: str | Path, text: str) -> None:
    """Writes a document whole or not at all."""
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
