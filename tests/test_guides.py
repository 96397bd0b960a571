"""The code of README, the first page and the guides runs, each page in a process of its own.

The blocks of a page make one program, in their order. A comment before a block says what it needs:
`<!-- needs: lightning -->`. A page is run once without such blocks and once more for each need. A block that needs
`torchrun` is a program of its own.
"""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from .forking import Forking

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "reference" / "torch.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[\w ]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PACKAGES = ("lightning", "accelerate", "transformers")
# Nothing is looked up, downloaded or reported; the interpreter's kernels are too slow for a guide.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "1", "OMP_NUM_THREADS": "1"}
# One process in eight that used FSDP2 with gloo ends so after its last line, with torch.optim's AdamW as well
# (torch 2.13).
ABORTED = "terminate called without an active exception"
N_ATTEMPTS = 4
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Block(NamedTuple):
    needs: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["needs"] or "", found["code"], text[: found.start("code")].count("\n"))
        for found in BLOCK.finditer(text)
    ]


def cases() -> list[tuple[Path, str]]:
    return [(page, needs) for page in PAGES for needs in sorted({"", *(block.needs for block in blocks(page))})]


def name(value: object) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value) or "plain"


def skip_where_missing(needs: str) -> None:
    if needs in PACKAGES and find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed (the clients extra)")
    if needs == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def program(page: Path, needs: str) -> str:
    """The blocks to run, each at its line of the page, so that an error names that line."""
    lines: list[str] = []
    for block in blocks(page):
        if block.needs == needs or (not block.needs and needs != "torchrun"):
            lines += [""] * (block.line - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | OFFLINE


@pytest.fixture(scope="module")
def compiling() -> Iterator[Forking]:
    """What runs Python where kernels are not interpreted."""
    with Forking(environment()) as python:
        yield python


def run_page(python: Forking, path: Path, *launcher: str) -> tuple[int, str]:
    """Exit code and output of a program."""
    variables = {**environment(), "PYTHON_EXEC": str(python.executable(path.with_name("python")))}
    for _ in range(N_ATTEMPTS):
        code, out, err = python.run(*launcher, path, cwd=path.parent, env=variables)
        if not launcher or ABORTED not in err:
            break
    return code, out + err


def test_the_cases_are_the_frameworks_and_the_gpu() -> None:
    needs = {needs for _, needs in cases()}
    assert needs == {"", "cuda", "torchrun", *PACKAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_found_and_is_python(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page)) == text.count("```python") == text.count("```") / 2 > 0
    for block in blocks(page):
        compile(block.code, f"{name(page)}:{block.line}", "exec")


@pytest.mark.parametrize(("page", "needs"), cases(), ids=name)
def test_the_code_of_a_page_runs(page: Path, needs: str, tmp_path: Path, compiling: Forking) -> None:
    skip_where_missing(needs)
    path = tmp_path / "program.py"
    path.write_text(program(page, needs), encoding="utf-8")
    launcher = TORCHRUN if needs == "torchrun" else ()
    code, output = run_page(compiling, path, *launcher)
    assert code == 0, output[-8000:]


def test_an_error_in_a_block_is_found_at_its_line(tmp_path: Path, compiling: Forking) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", encoding="utf-8")
    path = tmp_path / "program.py"
    path.write_text(program(page, ""), encoding="utf-8")
    code, output = run_page(compiling, path)
    assert code == 1
    assert f'{path}", line 8' in output
