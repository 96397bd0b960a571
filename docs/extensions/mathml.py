r"""A Markdown extension that renders formulas as MathML when the site is built.

A browser shows MathML without a script, a font or a network. Formulas stand between dollars: `$...$` in a line,
`$$...$$` as a block of its own.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

# As in Pandoc: a formula neither starts nor ends with a blank, and no digit follows it ("$5 and $6").
INLINE = r"(?<![\\$])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?![\w$])"
BLOCK = re.compile(r"\$\$(.+)\$\$", re.DOTALL)

# Environments that only the right column knows. They mean the same inside of one formula.
SYNONYMS = {"{aligned}": "{align*}", "{gathered}": "{gather*}"}


def formula(latex: str, display: str) -> Element:
    """Convert one formula to MathML.

    Args:
        latex: LaTeX without its dollars.
        display: "inline" or "block".

    Raises:
        ValueError: for a command or an environment that cannot be converted.
    """
    for name, synonym in SYNONYMS.items():
        latex = latex.replace(name, synonym)
    element = convert_to_element(latex.strip(), display=display)
    if latex.count(r"\begin{") > len(element.findall(".//mtable")):
        raise ValueError(f"an environment cannot be converted to MathML, in the formula {latex!r}")
    for node in element.iter():
        # The converter writes symbols as references, which Markdown would escape once more.
        node.text = unescape(node.text or "")
        if "\\" in node.text or "&" in node.text:
            raise ValueError(f"{node.text!r} cannot be converted to MathML, in the formula {latex!r}")
    return element


class InlineMath(InlineProcessor):
    """A formula inside a line."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element, int, int]:  # noqa: N802  # Markdown's name
        """Convert what a pattern found; Markdown's interface."""
        return formula(self.unescape(m[1]), "inline"), m.start(0), m.end(0)


class BlockMath(BlockProcessor):
    """A formula as a block of its own, in a box that scrolls where the window is narrow."""

    def test(self, parent: Element, block: str) -> bool:
        """Tell whether this block is a formula; Markdown's interface."""
        return BLOCK.fullmatch(block.strip()) is not None

    def run(self, parent: Element, blocks: list[str]) -> None:
        """Convert the first block; Markdown's interface."""
        latex = blocks.pop(0).strip()[2:-2]
        SubElement(parent, "div", {"class": "formula"}).append(formula(latex, "block"))


class MathExtension(Extension):
    """Registers both."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Markdown's name
        """Put formulas behind code and before escapes and emphasis, which would change them."""
        md.inlinePatterns.register(InlineMath(INLINE, md), "math_inline", 185)
        md.parser.blockprocessors.register(BlockMath(md.parser), "math_block", 95)


def makeExtension(**options: Any) -> MathExtension:  # noqa: N802  # Markdown's name
    """Make the extension; Markdown calls this."""
    return MathExtension(**options)
