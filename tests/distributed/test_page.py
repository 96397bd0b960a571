"""The page names a test for each line, and the tests that it names exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_the_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE))
    assert len(named) > 30
    for path in {path for path, _ in named}:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for file, name in named if file == path} <= functions


def test_each_row_of_the_page_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line.rstrip(" |").endswith("test")]
    assert len(heads) >= 8
    assert [line for line in rows if line not in heads and "::test_" not in line and "same test" not in line] == []
