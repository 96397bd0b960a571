"""Pages name tests; they are to exist, and the page on compatibility names those of what it is about."""

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NAMED = sorted(set(REFERENCE.findall(PAGE.read_text(encoding="utf-8"))))
ALL_NAMED = {
    found for page in (ROOT / "docs").rglob("*.md") for found in REFERENCE.findall(page.read_text("utf-8"))
}


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_named_test_exists() -> None:
    missing = [f"{path}::{name}" for path, name in sorted(ALL_NAMED) if name not in names_in(ROOT / path)]
    assert missing == []
    assert len(NAMED) > 40


def test_every_row_of_its_tables_names_a_test() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line, after in pairwise(lines) if line.startswith("| ") and not after.startswith("|--")]
    assert [row for row in rows if "::test_" not in row] == []
    assert len(rows) > 60


def test_every_client_is_on_the_page() -> None:
    named = {path for path, _ in NAMED}
    clients = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "clients").glob("test_*.py")}
    assert clients <= named
