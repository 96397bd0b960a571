"""``dragon-vm``: every option does what it says, prints it, and tells it by its exit status."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dragon.kernels import launch
from dragon.vm import tune
from dragon.vm.measuring import machine
from dragon.vm.torch.optim._backends import configs
from dragon.vm.tuning import run as run_module
from dragon.vm.tuning import store
from dragon.vm.tuning.jobs import COMMON

from ..forking import Forking
from .support import MACHINE, Clock, PlantedBench, planted_tools, result
from .test_search import PLANTED, bowl

GUIDE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def call(*arguments: str) -> int:
    return tune.console(["tune", *arguments])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(machine, "present_gpu", lambda: None)


@pytest.fixture
def planted_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, PlantedBench]:
    """A GPU whose benches are planted, by the size of their job."""
    benches: dict[str, PlantedBench] = {}
    clock = Clock()
    tools = planted_tools(lambda job: benches.setdefault(job.size, PlantedBench(bowl, 0.01, clock=clock)), clock)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(machine, "present_gpu", lambda: MACHINE)
    monkeypatch.setattr(run_module, "tools_of", lambda machine: tools)
    return benches


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 1
    assert "no CUDA or ROCm GPU" in capsys.readouterr().out


@pytest.mark.usefixtures("planted_gpu")
def test_a_run_stores_its_results_and_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--kernel", "adam bf16", "--case", "small", "--case", "large") == 0
    printed = capsys.readouterr().out
    assert printed.count("4096/8 evict_first 4 persistent") == 2
    assert {found["size"] for _, found in store.scan()} == {"small", "large"}
    assert {found["kernel"] for _, found in store.scan()} == {"adam bf16"}


def test_ctrl_c_says_what_is_kept(
    planted_gpu: dict[str, PlantedBench], capsys: pytest.CaptureFixture[str]
) -> None:
    planted_gpu["transformer"] = PlantedBench(bowl, 0.01, interrupt_at=30)
    assert call("--kernel", "accumulate fp32") == 1
    assert "Interrupted" in capsys.readouterr().out
    assert [found["size"] for _, found in store.scan()] == ["large"]


@pytest.mark.usefixtures("no_gpu")
def test_a_dry_run_lists_what_would_run_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--dry-run", "--case", "small") == 0
    printed = capsys.readouterr().out
    assert all(f"{name}, small: 1000 tensors" in printed for name in COMMON)
    assert f"{len(COMMON)} searches" in printed
    assert list(store.scan()) == []


@pytest.mark.usefixtures("interpreted")
def test_in_the_interpreter_a_run_is_a_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--dry-run", "--kernel", "adam fp32", "--case", "large") == 0
    printed = capsys.readouterr().out
    assert "adam fp32, large: 2 tensors, 1,033 elements" in printed
    assert "\n1 search on: interpreter\n" in printed


def test_show_prints_what_is_stored_and_what_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    store.save(result(PLANTED))
    broken = store.save(result(size="large"))
    broken.write_text("{")
    assert call("--show") == 0
    printed = capsys.readouterr().out
    assert "Planted GPU: adam fp32, small: 4096/8 evict_first 4 persistent" in printed
    assert "+10.0% against the default" in printed
    assert f"ignored: {broken}: " in printed


def test_results_move_between_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "results.json"
    assert call("--export", str(exported)) == 1
    assert not exported.exists()
    store.save(result(PLANTED))
    assert call("--export", str(exported)) == 0
    assert capsys.readouterr().out.endswith(f"\n1 result written to {exported}\n")
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    assert call("--import", str(exported)) == 0
    assert capsys.readouterr().out.endswith(f"1 result of {exported} stored\n")
    assert [found for _, found in store.scan()] == [result(PLANTED)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "huge"), "large, transformer, small"),
        (("--kernel", "lion"), "adam fp32"),
        (("--kernel", "norm"), "is not tuned"),
        (("--time-budget", "soon"), "90s"),
        (("--time-budget", "99999999h", "--dry-run"), "90s"),
        (("--kernel", "", "--dry-run"), "--kernel ''"),
        (("--import", "here.json", "--export", "there.json"), "not allowed with argument --import"),
        (("--show", "--kernel", "foo"), "leave them out with --show"),
        (("--export", "there.json", "--case", "small"), "leave them out with --show"),
        (("--import", "/nowhere/at/all"), "--import /nowhere/at/all: "),
        (("--import", __file__), f"--import {__file__}: it is not JSON: "),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_right(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), ("10m", 600), ("1h", 3600)])
def test_times_are_read_with_their_unit(text: str, expected: float) -> None:
    assert tune.seconds(text) == expected


def test_the_doctor_is_a_command_and_its_findings_are_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (0, 1):
        monkeypatch.setattr("dragon.vm.doctor.main", lambda status=status: status)
        assert tune.console(["doctor"]) == status


def test_the_parity_kit_is_needed_for_a_measurement_only(forking: Forking, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('numpy.testing', 'hypothesis', 'dragon.vm.testing'): sys.modules[name] = None\n"
        "from dragon.vm.tune import console\n"
        "assert console(['tune', '--dry-run']) == 0\n"
        "sys.exit(console(['tune', '--kernel', 'adam fp32']))"
    )
    ended = forking.run("-c", code, cwd=tmp_path)
    assert ended.code == 1, ended.err
    assert ended.out.splitlines()[-1].endswith('is not installed: pip install "dragon-vm-torch[cli]"')


def test_the_guide_explains_every_option() -> None:
    commands = next(action for action in tune.make_parser()._actions if action.dest == "command")
    options = set(re.findall(r"--[a-z-]+", commands.choices["tune"].format_help())) - {"--help"}
    assert {option for option in options if f"`{option}" not in GUIDE} == set()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    planted_gpu: dict[str, PlantedBench],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(file))
    with pytest.raises(SystemExit) as stopped:
        call("--kernel", "accumulate fp32")
    assert stopped.value.code == 2
    assert f"cannot store results in {file}" in capsys.readouterr().err
    assert not planted_gpu


SHOW = "tune", "--show"


def code_of(command: Sequence[str]) -> str:
    return f"import sys; from dragon.vm.tune import console; sys.exit(console({[*command]}))"


def show(stdout: Any, **environment: str) -> tuple[int, str]:
    """Exit status and complaints of a process that prints stored results to a file, as its environment says."""
    command, variables = [sys.executable, "-c", code_of(SHOW)], {**os.environ, **environment}
    ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=variables)
    return ended.returncode, ended.stderr


def test_a_reader_that_leaves_is_no_wrong_argument(forking: Forking, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert forking.run("-c", code_of(SHOW), cwd=tmp_path, printing_to=writer) == (1, "", "")
    os.close(writer)


def test_the_help_of_run_ends_quietly_where_its_reader_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dragon.vm.run", "-h"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize(("command", "unbuffered"), [(SHOW, False), (SHOW, True), (("doctor",), False)])
def test_a_full_disk_is_no_wrong_argument(
    command: tuple[str, ...], unbuffered: bool, forking: Forking, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        if unbuffered:
            status, said = show(full, PYTHONUNBUFFERED="1")
        else:
            status, _, said = forking.run("-c", code_of(command), cwd=tmp_path, printing_to=full.fileno())
    assert (status, said) == (1, f"dragon-vm: error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n")


@pytest.mark.usefixtures("planted_gpu")
def test_a_disk_that_fills_up_ends_a_run_with_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store, "write_atomically", fail)
    assert call("--kernel", "accumulate fp32", "--case", "small") == 1
    assert capsys.readouterr().err.startswith(f"dragon-vm: error: [Errno {errno.ENOSPC}]")


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    folder = {configs.FOLDER_VARIABLE: str(tmp_path / "t\u00fcning"), "PYTHONIOENCODING": "ascii"}
    with (tmp_path / "shown").open("w+") as file:
        assert show(file, **folder) == (0, "")
    assert (tmp_path / "shown").read_text() == f"0 results in {tmp_path}/t\\xfcning\n"
