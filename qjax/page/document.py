"""A self-contained HTML document: one file that fetches nothing."""

from html import escape
from importlib import resources


def document(title: str, body: str) -> str:
    """Puts a body between the styles and the script that all documents share.

    Args:
      title: plain text.
      body: HTML.
    """
    template = resources.files("qjax.page").joinpath("page.html").read_text()
    return template.replace("{{title}}", escape(title)).replace("{{body}}", body)
