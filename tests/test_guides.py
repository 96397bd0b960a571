"""The code of README, the first page and the guides runs, each page in a process of its own.

The blocks of a page make one program, in their order. A comment before a block says what it needs:
`<!-- needs: lightning -->`. A page is run once without such blocks and once more for each need. A block that needs
`torchrun` is a program of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

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

Runner = Callable[[Path], tuple[int, str]]


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


# Imports what each page does, and runs each program that it is told of in a process forked from itself.
FORKING = """
import gc, os, runpy, sys
import torch, torch._dynamo

gc.freeze()

for line in sys.stdin:
    path = line.rstrip()
    child = os.fork()
    if child == 0:
        os.chdir(os.path.dirname(path))
        log = os.open(path + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [path]
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | OFFLINE


@pytest.fixture(scope="module")
def run_forked() -> Iterator[Runner]:
    """Exit code and output of a program, which does not see what others leave behind."""
    command = [sys.executable, "-c", FORKING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:

        def run(path: Path) -> tuple[int, str]:
            print(path, file=process.stdin, flush=True)
            return int(process.stdout.readline()), Path(f"{path}.log").read_text(encoding="utf-8")

        yield run
        process.stdin.close()


def run_with_torchrun(path: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    for _ in range(N_ATTEMPTS):
        done = subprocess.run(
            command, cwd=path.parent, env=environment(), capture_output=True, text=True, check=False
        )
        if ABORTED not in done.stderr:
            break
    return done.returncode, done.stdout + done.stderr


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
def test_the_code_of_a_page_runs(page: Path, needs: str, tmp_path: Path, run_forked: Runner) -> None:
    skip_where_missing(needs)
    path = tmp_path / "program.py"
    path.write_text(program(page, needs), encoding="utf-8")
    code, output = (run_with_torchrun if needs == "torchrun" else run_forked)(path)
    assert code == 0, output[-8000:]


def test_an_error_in_a_block_is_found_at_its_line(tmp_path: Path, run_forked: Runner) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", encoding="utf-8")
    path = tmp_path / "program.py"
    path.write_text(program(page, ""), encoding="utf-8")
    code, output = run_forked(path)
    assert code == 1
    assert f'{path}", line 8' in output
