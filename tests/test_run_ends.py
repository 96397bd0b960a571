"""How a process ends that `python -m dragon.vm.run` began: as with `python`, and with the report last."""

import subprocess
import sys
from pathlib import Path

import pytest

from .forking import Forking
from .test_run import FILES, NOTHING, python, write_files


@pytest.mark.parametrize(
    "script", ["interrupted.py", "at_exit.py", "failed.py", "beside.py", "closed.py", "silent.py"]
)
def test_a_process_ends_as_with_python(script: str, forking: Forking, tmp_path: Path) -> None:
    write_files(tmp_path)
    code, out, err = forking.run("-m", "dragon.vm.run", script, cwd=tmp_path)
    assert (code, out, err.replace(NOTHING, "")) == python(script, cwd=tmp_path)


@pytest.mark.parametrize(
    "start", ["threading.Thread(target=lambda: (threading.main_thread().join(), build())).start()",
              "atexit.register(build)"],
)  # fmt: skip
def test_what_outlasts_the_script_builds_ours_too(start: str, forking: Forking, tmp_path: Path) -> None:
    build = "torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, 2))])"
    (tmp_path / "outlasted.py").write_text(f"import atexit, threading, torch\ndef build(): {build}\n{start}\n")
    _, _, err = forking.run("-m", "dragon.vm.run", "outlasted.py", cwd=tmp_path)
    assert err == "dragon.vm.run: 1 optimizer replaced\n  torch.optim.AdamW: 8 parameters in 1 tensor, 0 steps\n"


def test_a_script_comes_from_the_standard_input_as_with_python(forking: Forking, tmp_path: Path) -> None:
    text = FILES["names.py"] + "raise ValueError('wrong')\n"
    command = [sys.executable, "-", "a", "-b"]
    expected = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True)
    code, out, err = forking.run("-m", "dragon.vm.run", *command[1:], cwd=tmp_path, given=text)
    assert (code, out) == (expected.returncode, expected.stdout) == (1, out)
    assert err == expected.stderr + NOTHING
