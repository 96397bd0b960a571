import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dragon.vm.run import main

SCRIPT = """
import pickle
import sys

import helper
import torch
from torch.optim import AdamW


class Model(torch.nn.Linear):
    pass


if __name__ == "__main__":
    model = pickle.loads(pickle.dumps(Model(3, 2)))
    optimizer = AdamW(model.parameters(), lr=0.1, foreach=True)
    for _ in range(helper.STEPS):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(type(optimizer).__module__, isinstance(optimizer, torch.optim.AdamW), sys.argv[1:], __file__)
    if sys.argv[1:] == ["exit"]:
        sys.exit(7)
    if sys.argv[1:] == ["boom"]:
        raise RuntimeError("boom")
"""
Runner = Callable[..., int]
REPORT = """dragon.vm.run: 1 optimizer replaced
  torch.optim.AdamW: 8 parameters in 2 tensors, 5 steps
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("STEPS = 5\n")
    return tmp_path


def test_a_script_runs_unmodified_in_a_process_of_its_own(folder: Path) -> None:
    command = [sys.executable, "-m", "dragon.vm.run", f"{folder.name}/train.py", "exit"]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    expected = f"dragon.vm.torch.optim._swap True ['exit'] {folder.name}/train.py\n"
    assert (done.returncode, done.stdout, done.stderr) == (7, expected, REPORT)


@pytest.fixture
def run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Run in this process, in the script's folder, and restore what a run changes."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["somewhere", *sys.path])
    yield lambda *arguments: main(arguments)
    sys.modules.pop("helper", None)


def test_the_report_says_what_was_replaced(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("train.py", "--lr", "3") == 0
    assert capsys.readouterr() == ("dragon.vm.torch.optim._swap True ['--lr', '3'] train.py\n", REPORT)
    assert type(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).__module__ == "torch.optim.adamw"


def test_the_exit_code_is_the_scripts(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_here("train.py", "exit")
    assert exit_.value.code == 7
    assert capsys.readouterr().err == REPORT


def test_a_traceback_is_the_scripts_own(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("train.py", "boom") == 1
    line = SCRIPT.splitlines().index('        raise RuntimeError("boom")') + 1
    trace = f"""Traceback (most recent call last):
  File "train.py", line {line}, in <module>
    raise RuntimeError("boom")
RuntimeError: boom
"""
    assert capsys.readouterr().err == trace + REPORT


def test_a_module_runs_as_with_python_m(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("-m", "train", "x") == 0
    out, err = capsys.readouterr()
    assert err == REPORT
    assert "['x']" in out


def test_without_a_script_it_says_how_to_use_it(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here() == 2
    assert run_here("--help") == 0
    assert capsys.readouterr().err.count("usage: python -m dragon.vm.run") == 2


def test_a_script_without_an_optimizer_is_told_so(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nothing.py").write_text("print('done')\n")
    assert run_here("nothing.py") == 0
    assert capsys.readouterr() == ("done\n", "dragon.vm.run: no optimizer was replaced\n")
