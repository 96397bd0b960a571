"""The prose of README and docs: short sentences, no address of one machine, and commands that exist."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LONGEST_SENTENCE = 30  # words; the rule asks for 20

FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
CODE = re.compile(r"(`+).+?\1", re.DOTALL)
LINK = re.compile(r"!?\[([^]]*)\](?:\([^)]*\)|\[[^]]*\])")
# A new paragraph begins after an empty line and at items, headings, quotes, definitions and rows of tables.
BREAK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*+] |\d+[.)] |#|>|\||:::))")
END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_`\[]*[A-Z0-9CODE])")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|etc|cf)\.")

MAKE = re.compile(r"(?:^ {4}|`)make (?:[A-Z_]+=\S+ )*([a-z][\w-]*)", re.MULTILINE)
CONSOLE = re.compile(r"(?:^ {4}|`)dragon-vm ([a-z][\w-]*)", re.MULTILINE)
MODULE = re.compile(r"python -m (dragon\.[\w.]+)")


def prose(text: str) -> str:
    """A page without code, formulas and addresses; a piece of code inside a sentence counts as one word."""
    text = COMMENT.sub("", FENCE.sub("\n\n", text))
    text = re.sub(r"(?:\A|\n\n)(?: {4}.*(?:\n|\Z)|\n)+", "\n\n", text)
    text = FORMULA.sub("CODE", CODE.sub("CODE", text))
    return ABBREVIATIONS.sub(r"\1", LINK.sub(r"\1", text))


def sentences(text: str) -> Iterator[str]:
    for paragraph in BREAK.split(prose(text)):
        cells = paragraph.split("|") if paragraph.lstrip().startswith("|") else [paragraph]
        for cell in cells:
            yield from END.split(" ".join(cell.split()))


def n_words(sentence: str) -> int:
    return len(re.findall(r"[^\s·]*\w[^\s·]*", sentence))


def too_long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if n_words(sentence) > LONGEST_SENTENCE]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_sentence_is_long(page: Path) -> None:
    assert too_long(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_page_names_a_path_of_one_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.~:/-])/(?:work|root|home|Users|mnt|opt|tmp)/\S*", text) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_page_mentions_a_plan_or_an_issue(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\bissue #?\d+|\bTODO\b|\b[Rr]oadmap\b|\bfor now\b|\bnot yet implemented\b", text) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).is_file()] == []


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in MAKE.findall(page.read_text(encoding="utf-8"))}
    assert {"demo", "test", "docs", "docs-serve"} <= named
    assert named - targets == set()


def test_every_console_command_that_a_page_names_exists() -> None:
    from dragon.vm.tune import make_parser

    named = {name for page in PAGES for name in CONSOLE.findall(page.read_text(encoding="utf-8"))}
    assert {"doctor", "tune"} <= named
    usage = make_parser().format_usage()
    assert [name for name in named if not re.search(rf"\b{name}\b", usage)] == []


def test_the_shell_completes_the_console_command() -> None:
    pytest.importorskip("argcomplete", reason="the cli extra is not installed")
    # What the line of the documentation makes the shell do; descriptor 8 takes the answer.
    environment = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": "dragon-vm do", "COMP_POINT": "12"}
    code = "import os; os.dup2(1, 8); from dragon.vm.tune import console; console()"
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert answer.stdout.decode().strip() == "doctor"


def test_every_module_that_a_page_runs_exists() -> None:
    from importlib.util import find_spec

    named = {name for page in PAGES for name in MODULE.findall(page.read_text(encoding="utf-8"))}
    assert "dragon.vm.run" in named
    assert {name for name in named if find_spec(name) is None} == set()


LONG = " ".join(["word"] * 31)


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG}.",
        f"Short. {LONG}! Short.",
        f"* item\n* {LONG}\n",
        f"| a | {LONG} |\n|---|---|\n",
        f"Text before\n{LONG} `code`.\n\n    code",
        f"A [{LONG}](address.md).",
    ],
)
def test_a_long_sentence_is_found(text: str) -> None:
    assert len(too_long(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{LONG}\n```",
        f"Text.\n\n    {LONG}\n\nText.",
        f"<!-- {LONG} -->",
        f"Run `{LONG}` now.",
        " ".join(["Ten words are in this sentence, and it is short."] * 10),
        "- " + "\n- ".join(["word"] * 40),
    ],
)
def test_code_comments_and_short_sentences_are_left_alone(text: str) -> None:
    assert too_long(text) == []
