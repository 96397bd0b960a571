"""Rules of style that a reader would otherwise have to check by eye."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dragon_vm", "kernels", "tests", "benchmarks", "examples", "docs", ".ci")
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".jsonl", ".sh", ".txt", ".css", ".js", ""}

LONGEST_FILE = 300
LONGEST_TEST_FILE = 400
LARGEST_FOLDER = {"dragon_vm/tuning": 1000}
LONGEST_FUNCTION = 60  # without its docstring, so that nobody saves on that

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users|mnt|opt)/\w")
SUPPRESSION = re.compile(
    r"# (?:type: ignore(?P<code>\[[\w,\s-]+\])?|noqa(?P<rule>: ?[A-Z]+\d+(?:, ?[A-Z]+\d+)*)?)"
)
UNLINKED_TODO = re.compile(r"\b(?:TODO|FIXME|XXX)\b(?!.*https?://)")
BANNER = re.compile(r"^\s*#\s*[-=*#~]{4,}")


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def texts() -> Iterator[Path]:
    """Every text file of the project, without what tools write."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and path.name != ".git")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def matches(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the `def` to the end of the body, without the docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_few_screens(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = LONGEST_TEST_FILE if path.is_relative_to(ROOT / "tests") else LONGEST_FILE
    assert len(text.splitlines()) < limit, "one concept a file: split it"
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [node.name for node in functions if length(node) >= LONGEST_FUNCTION] == []


@pytest.mark.parametrize(("folder", "limit"), LARGEST_FOLDER.items())
def test_a_folder_beside_the_heart_stays_small(folder: str, limit: int) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")]
    assert 0 < sum(len(text.splitlines()) for text in texts) <= limit


def test_no_committed_file_is_outside_of_the_projects_folders() -> None:
    """What a compiler or a benchmark wrote beside them came by accident."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a checkout that git trusts")
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert folders == set(FOLDERS)


def test_no_file_names_a_path_of_one_machine() -> None:
    assert matches(MACHINE_PATH, list(texts())) == []


def test_every_suppressed_warning_has_a_code_and_a_reason() -> None:
    bare = []
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for found in SUPPRESSION.finditer(line):
                reason = line[found.end() :].strip(" #-:,")
                if path != Path(__file__) and not (reason and (found["code"] or found["rule"])):
                    bare.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert bare == []


def test_no_comment_is_a_banner() -> None:
    assert matches(BANNER, sources()) == []


def test_every_deferred_task_has_a_link() -> None:
    assert matches(UNLINKED_TODO, [path for path in sources() if path != Path(__file__)]) == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (MACHINE_PATH, "see /" + "home/me/data"),
        (SUPPRESSION, "x = f()  # type: ignore[arg-type]"),
        (SUPPRESSION, "x = f()  # noqa: E501"),
        (UNLINKED_TODO, "# TODO later"),
        (BANNER, "    # -------- helpers"),
    ],
)
def test_the_patterns_catch_what_they_are_for(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)
