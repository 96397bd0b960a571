"""The two Markdown extensions of the site: formulas, and reStructuredText in docstrings."""

import pytest

markdown = pytest.importorskip("markdown", reason="the docs extra is not installed (it needs Python 3.11)")
pytest.importorskip("latex2mathml", reason="the docs extra is not installed (it needs Python 3.11)")

EXTENSIONS = ["docs.extensions.docstrings", "docs.extensions.mathml", "tables", "pymdownx.superfences"]


def render(text: str) -> str:
    return markdown.markdown(text, extensions=EXTENSIONS)


def test_a_formula_in_a_line_is_mathml_in_this_line() -> None:
    html = render(r"With $\beta_2 = 0.999$ it is so.")
    assert html.startswith("<p>With <math ")
    assert 'xmlns="http://www.w3.org/1998/Math/MathML"' in html
    assert 'display="inline"' in html
    assert "<msub><mi>β</mi><mn>2</mn></msub>" in html
    assert html.endswith("</math> it is so.</p>")


def test_a_formula_of_its_own_stands_in_a_box_that_scrolls() -> None:
    html = render("Text.\n\n$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$\n\nText.")
    assert html.count('<div class="formula">\n<math') == 1
    assert html.count("<mtr>") == 2


@pytest.mark.parametrize(
    "text", ["It costs $5 and $6.", "`$x$`", "```sh\necho $HOME $PATH\n```", "    $x$", r"\$x\$"]
)
def test_dollars_that_are_no_formula_stay(text: str) -> None:
    assert "<math" not in render(text)
    assert "$" in render(text)


@pytest.mark.parametrize("latex", [r"$\nocommand x$", r"$a & b$", "$$\\begin{nothing} x \\end{nothing}$$"])
def test_a_formula_that_cannot_be_converted_is_an_error(latex: str) -> None:
    with pytest.raises(ValueError, match="cannot be converted to MathML"):
        render(latex)


def test_the_math_directive_takes_the_lines_that_stand_further_right() -> None:
    html = render("Before.\n\n.. math::\n    a = b,\n\n    c = d\n\nAfter.")
    assert html.count("<math") == 1
    assert "<mi>d</mi>" in html
    assert "<p>After.</p>" in html


def test_a_link_of_docstrings_is_a_link() -> None:
    assert render("See `the paper <https://arxiv.org/abs/1>`_.") == (
        '<p>See <a href="https://arxiv.org/abs/1">the paper</a>.</p>'
    )
