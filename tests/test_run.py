import io
import multiprocessing.spawn
import os
import py_compile
import subprocess
import sys
import warnings
import zipapp
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dragon.vm.run import HELP, HINT, USAGE, main

from .forking import Ended, Forking

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
    found = type(optimizer).__module__, isinstance(optimizer, torch.optim.AdamW), sys.argv[1:], __file__
    # In one piece: torchrun's processes share what they print to.
    print(" ".join(map(str, found)) + chr(10), end="")
    if sys.argv[1:] == ["exit"]:
        sys.exit(7)
    if sys.argv[1:] == ["boom"]:
        raise RuntimeError("boom")
"""
Runner = Callable[..., int]
REPORT = """dragon.vm.run: 1 optimizer replaced
  torch.optim.AdamW: 8 parameters in 2 tensors, 5 steps
"""
NOTHING = f"dragon.vm.run: no optimizer was replaced in this process\n{HINT}\n"
AT_EXIT = """
import atexit
import pickle


class Model:
    pass


atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Model()))).__module__))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("STEPS = 5\n")
    return tmp_path


def python(*arguments: object, cwd: Path, **environment: str) -> Ended:
    """What becomes of a Python process."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_script_runs_unmodified_in_a_process_of_its_own(folder: Path) -> None:
    script = f"{folder.name}/train.py"
    found = python("-m", "dragon.vm.run", script, "exit", cwd=folder.parent, PYTHONWARNINGS="error")
    assert found == (7, f"dragon.vm.torch.optim.adam True ['exit'] {folder / 'train.py'}\n", REPORT)


@pytest.fixture
def run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Run in this process, in the script's folder, and restore what a run changes."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["somewhere", *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield lambda *arguments: main(arguments)
    for name in ("helper", "package", "package.inner"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("flags", [{"safe_path": True, "isolated": 0}, {"isolated": 1}], ids=str)
def test_a_safe_path_has_no_folder_of_the_script(
    run_here: Runner, flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("alone.py").touch()
    before = list(sys.path)
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags))
    run_here("alone.py")
    assert sys.path == before


def test_the_report_says_what_was_replaced(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    of_children = multiprocessing.spawn.get_preparation_data
    assert run_here("train.py", "--lr", "3") == 0
    assert capsys.readouterr() == (
        f"dragon.vm.torch.optim.adam True ['--lr', '3'] {Path.cwd() / 'train.py'}\n",
        REPORT,
    )
    assert type(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).__module__ == "torch.optim.adamw"
    assert multiprocessing.spawn.get_preparation_data is of_children


def test_the_exit_code_is_the_scripts(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_here("train.py", "exit")
    assert exit_.value.code == 7
    assert capsys.readouterr().err == REPORT


def test_a_traceback_is_the_scripts_own(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("train.py", "boom") == 1
    line = SCRIPT.splitlines().index('        raise RuntimeError("boom")') + 1
    trace = f"""Traceback (most recent call last):
  File "{Path.cwd() / "train.py"}", line {line}, in <module>
    raise RuntimeError("boom")
RuntimeError: boom
"""
    assert capsys.readouterr().err == trace + REPORT


def test_a_traceback_is_behind_what_the_script_has_printed(
    run_here: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("printing.py").write_text("print('before')\nraise ValueError('wrong')\n")
    both = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(both, write_through=name == "stderr"))
    assert run_here("printing.py") == 1
    assert both.getvalue().startswith(b"before\nTraceback")


def test_an_error_of_a_package_is_shown_from_its_own_line_on(
    run_here: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("package").mkdir()
    Path("package/__init__.py").write_text("raise ValueError('wrong')\n")
    assert run_here("-m", "package.inner") == 1
    first = capsys.readouterr().err.splitlines()[1]
    assert first == f'  File "{Path("package/__init__.py").absolute()}", line 1, in <module>'


def test_the_rank_that_reports_is_the_first(
    run_here: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("nothing.py").touch()
    for rank, is_told in (("1", False), ("0", True), ("not a number", True)):
        monkeypatch.setenv("RANK", rank)
        for script, report in (("train.py", REPORT), ("nothing.py", NOTHING)):
            assert run_here(script) == 0
            assert capsys.readouterr().err == (report if is_told else "")


def test_a_module_runs_as_with_python_m(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("-m", "train", "x") == 0
    out, err = capsys.readouterr()
    assert err == REPORT
    assert "['x']" in out


def test_it_says_how_to_use_it(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["--flatten", "--help"], ["--backend", "native", "-h", "train.py"]):
        assert run_here(*words) == 0
        assert capsys.readouterr() == (f"{HELP}\n", "")
    assert max(map(len, HELP.splitlines())) <= 115


WRONG = {
    (): "there is nothing to run",
    ("-m",): "there is nothing to run",
    ("--flatten",): "there is nothing to run",
    ("--nonsense", "train.py"): "unknown option --nonsense",
    ("-x", "train.py"): "unknown option -x",
    ("--flat", "train.py"): "unknown option --flat. Did you mean --flatten?",
    ("--lr", "1", "train.py"): "unknown option --lr",
    ("--process-group", "1", "train.py"): "unknown option --process-group",
    ("--state-dtyp", "8bit", "train.py"): "unknown option --state-dtyp. Did you mean --state-dtype?",
    ("--optim-bits", "8", "train.py"): "unknown option --optim-bits: here --state-dtype 8bit",
    ("--kahan-sum", "train.py"): "unknown option --kahan-sum: here --master-weights split16, which is exact",
    ("--state-dtype",): "argument --state-dtype: expected one argument",
    ("--state-dtype", "int8", "train.py"): (
        'state_dtype: expected a floating point dtype of 2 bytes or more, "8bit" or None, got torch.int8'
    ),
    ("--master-weights", "True", "train.py"): (
        """master_weights: expected torch.float32, "split16", "split8" or None, got 'True'"""
    ),
    ("--state-dtype", "exp_avg=bfloat16,exp_avg=float32", "train.py"): (
        "argument --state-dtype: exp_avg is named twice in 'exp_avg=bfloat16,exp_avg=float32'"
    ),
    ("--rounding-seed", "x", "-m", "train"): "argument --rounding-seed: invalid int value: 'x'",
    ("--backend", "cuda", "train.py"): "backend must be None, 'triton', 'native' or 'eager', but got 'cuda'",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_option_is_named_before_anything_runs(
    arguments: tuple[str, ...], run_here: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*arguments) == 2
    assert capsys.readouterr() == ("", f"{USAGE}\npython -m dragon.vm.run: error: {WRONG[arguments]}\n")
    assert type(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).__module__ == "torch.optim.adamw"


def test_an_unmodified_script_trains_in_8_bits(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    Path("narrow.py").write_text(
        "import sys, torch\n"
        "p = torch.nn.Parameter(torch.ones(64, 64))\n"
        "p.grad = torch.ones(64, 64)\n"
        "optimizer = torch.optim.Adam([p])\n"
        "optimizer.step()\n"
        "print(sys.argv, sorted(optimizer.state[p]))\n"
    )
    assert run_here("--state-dtype", "8bit", "narrow.py", "--lr", "3") == 0
    states = ["exp_avg_q8", "exp_avg_scale", "exp_avg_sq_q8", "exp_avg_sq_scale", "step", "stream"]
    assert capsys.readouterr().out == f"{['narrow.py', '--lr', '3']} {states}\n"


def test_a_script_without_an_optimizer_is_told_so(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nothing.py").write_text("print('done')\n")
    assert run_here("nothing.py") == 0
    assert capsys.readouterr() == ("done\n", NOTHING)


def test_an_optimizer_that_ours_refuses_is_pytorchs(run_here: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    Path("twice.py").write_text(
        "import torch\np = torch.nn.Parameter(torch.ones(2))\n"
        "try: print(type(torch.optim.Adam([p, p])).__module__)\nexcept UserWarning: pass\n"
        "torch.optim.SGD([p], lr=0.1)\n"
        "class Own(torch.optim.Adam): pass\n"
        "Own([p])\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_here("twice.py") == 0
    out, err = capsys.readouterr()
    assert out == "torch.optim.adam\n"
    lines = err.splitlines()
    assert lines[:2] == [
        "dragon.vm.run: 1 optimizer replaced",
        "  torch.optim.SGD: 2 parameters in 1 tensor, 0 steps",
    ]
    assert lines[2].startswith("  not replaced: torch.optim.Adam: ours refuses it: ValueError: ")
    assert lines[3:] == ["  not replaced: __main__.Own: it is derived from torch.optim.Adam"]


FILES = {
    "package/__init__.py": "",
    "package/inner/__main__.py": "import sys\nprint(sys.argv, __name__, __spec__.name, __package__)\n",
    "folder/__main__.py": "import sys\nprint(sys.argv, sys.path[0], __name__, __file__, __builtins__)\n",
    "broken.py": "def f(:\n",
    "interrupted.py": "import atexit\natexit.register(print, 'bye')\ndef f(): raise KeyboardInterrupt\nf()\n",
    "at_exit.py": AT_EXIT,
    "failed.py": (
        "import atexit\nimport sys\n"
        "atexit.register(lambda: print(repr(sys.last_value), sys.last_traceback.tb_lineno))\n"
        "raise ValueError('wrong')\n"
    ),
    "closed.py": "import sys\nsys.stdout.close()\nraise ValueError('wrong')\n",
    "silent.py": "import sys\nsys.stdout = sys.stderr = None\n",
    "beside.py": "class Stop(BaseException): pass\nraise Stop('here')\n",
    "names.py": (
        "import sys\nprint(__name__, __spec__, __package__, __file__, sys.path[0], sys.argv)\n"
        "print(globals().get('__cached__', 'no'), getattr(__loader__, '__name__', type(__loader__).__name__))\n"
        "def typed(x: int): pass\nprint(typed.__annotations__)\n"
    ),
    "package/names.py": "print(globals().get('__cached__', 'no'), __file__, type(__loader__).__name__)\n",
}


def write_files(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    zipapp.create_archive(folder / "folder", folder / "archive.pyz")
    py_compile.compile(str(folder / "names.py"), str(folder / "compiled.pyc"))
    py_compile.compile(str(folder / "package" / "names.py"), str(folder / "package" / "moved.pyc"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.py"],
        ["-m", "missing_module"],
        ["-m", "missing_package.part"],
        # It has no code object.
        ["-m", "math"],
        ["-m", "package"],
        ["package"],
        ["folder"],
        ["archive.pyz"],
        ["-m", "package.inner"],
        ["-m", "package.inner", "--", "a", "-m", "b"],
        ["-mpackage.inner", "--x", "1"],
        ["broken.py"],
        ["names.py"],
        ["compiled.pyc"],
        ["-m", "package.names"],
        # Compiled from a file elsewhere.
        ["-m", "package.moved"],
    ],
    ids=" ".join,
)
def test_it_runs_and_refuses_what_python_does(
    arguments: list[str], run_here: Runner, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_files(tmp_path)
    expected = python(*arguments, cwd=tmp_path)
    status = run_here(*arguments)
    out, err = capfd.readouterr()
    assert (status, out, err.replace(NOTHING, "")) == expected


@pytest.mark.parametrize("path", ["link/../names.py", "link/../folder", "linked.py"])
def test_the_folder_of_a_link_is_that_of_its_target(
    path: str,
    run_here: Runner,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    link: Callable[[Path, Path], None],
) -> None:
    write_files(tmp_path)
    away = tmp_path / "away" / "inner"
    (away.parent / "folder").mkdir(parents=True)
    away.mkdir()
    (away.parent / "names.py").write_text("import sys\nprint('away', sys.path[0])\n")
    (away.parent / "folder" / "__main__.py").write_text("import sys\nprint('away', sys.path[0])\n")
    link(tmp_path / "link", away)
    link(tmp_path / "linked.py", away.parent / "names.py")
    expected = python(path, cwd=tmp_path)
    assert expected.out.startswith("away")
    assert run_here(path) == 0
    assert capfd.readouterr() == (expected.out, NOTHING)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no shell that closes the standard input")
def test_a_closed_standard_input_is_an_empty_script_as_with_python(
    run_here: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sh", "-c", '"$0" -c "import sys; print(sys.stdin)" <&-', sys.executable]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "None\n"
    # A folder of that name is none that is run.
    Path("-").mkdir()
    monkeypatch.setattr(sys, "stdin", None)
    assert run_here("-") == 0
    assert capsys.readouterr() == ("", NOTHING)


@pytest.mark.parametrize("in_front", [True, False], ids=["in front", "behind"])
def test_a_launcher_goes_in_front(in_front: bool, forking: Forking, folder: Path) -> None:
    n_processes = 2 if in_front else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    run = ["-m", "dragon.vm.run"]
    command = (
        [*launcher, *run, "--state-dtype", "bfloat16", "train.py"] if in_front else [*run, *launcher, "train.py"]
    )
    environment = {**os.environ, "PYTHON_EXEC": str(forking.executable(folder / "python"))}
    code, out, err = forking.run(*command, cwd=folder, env=environment)
    assert code == 0, err
    module = "dragon.vm.torch.optim.adam" if in_front else "torch.optim.adamw"
    assert out == f"{module} True [] {folder / 'train.py'}\n" * n_processes
    assert err == (REPORT if in_front else NOTHING)
