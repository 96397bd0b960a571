"""A Markdown extension for the two reStructuredText constructs in docstrings that Markdown does not know.

PyTorch's and Dragon's docstrings have ``.. math::`` and links of the form `text <url>`_.
"""

from __future__ import annotations

import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

# The directive with the lines below it that are empty or stand further right.
MATH = re.compile(r"^(?P<indent> *)\.\. math::(?P<formula>.*(?:\n(?:(?P=indent) +\S.*|[ ]*$))*)", re.MULTILINE)
LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>`\s]+)>`_")


def to_markdown(text: str) -> str:
    """Write the two constructs in Markdown."""
    text = MATH.sub(lambda found: f"{found['indent']}$$ {' '.join(found['formula'].split())} $$\n\n", text)
    return LINK.sub(r"[\1](\2)", text)


class Docstrings(Preprocessor):
    """Applies `to_markdown` before Markdown reads a text."""

    def run(self, lines: list[str]) -> list[str]:
        """Convert a text, line by line; Markdown's interface."""
        return to_markdown("\n".join(lines)).split("\n")


class DocstringExtension(Extension):
    """Registers it."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Markdown's name
        """Put it behind fenced code, which it leaves alone."""
        md.preprocessors.register(Docstrings(md), "docstrings", 20)


def makeExtension(**options: Any) -> DocstringExtension:  # noqa: N802  # Markdown's name
    """Make the extension; Markdown calls this."""
    return DocstringExtension(**options)
