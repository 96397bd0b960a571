import io
import multiprocessing.spawn
import os
import sys
from pathlib import Path

import pytest

from dragon.vm._children import include_children, print_report
from dragon.vm.torch.optim import swap

from .forking import Forking
from .test_run import NOTHING

SPAWNING = """
import sys

import torch
import torch.distributed as dist


def work(rank, rendezvous):
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    torch.optim.SGD([torch.nn.Parameter(torch.ones(rank + 2))], lr=0.1)
    dist.barrier()  # a process that leaves while the other still connects would end that one
    dist.destroy_process_group()


if __name__ == "__main__":
    method, rendezvous = sys.argv[1:]
    torch.multiprocessing.start_processes(work, args=(rendezvous,), nprocs=2, start_method=method)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_of_multiprocessing_swap_too_and_the_first_reports(
    method: str, forking: Forking, tmp_path: Path
) -> None:
    (tmp_path / "many.py").write_text(SPAWNING)
    arguments = ["-m", "dragon.vm.run", "many.py", method, tmp_path / "meeting"]
    environment = {**os.environ, "PYTHON_EXEC": str(forking.executable(tmp_path / "python"))}
    code, _, err = forking.run(*arguments, cwd=tmp_path, env=environment)
    assert code == 0, err
    report = "dragon.vm.run: 1 optimizer replaced\n  torch.optim.SGD: 2 parameters in 1 tensor, 0 steps\n"
    assert err == report + NOTHING


@pytest.mark.parametrize("builds", [True, False])
def test_a_child_of_a_bare_fork_reports_what_itself_has_built(
    builds: bool, forking: Forking, tmp_path: Path
) -> None:
    (tmp_path / "forked.py").write_text(
        "import os, torch\n"
        "class Own(torch.optim.Adam): pass\n"
        "param = torch.nn.Parameter(torch.ones(2))\n"
        "torch.optim.Adam([param]), Own([param])\n"
        "if os.fork(): os.wait()\n"
        f"elif {builds}: torch.optim.SGD([param])\n"
    )
    code, _, err = forking.run("-m", "dragon.vm.run", "forked.py", cwd=tmp_path)
    assert code == 0, err
    report = "dragon.vm.run: 1 optimizer replaced\n  torch.optim.{}: 2 parameters in 1 tensor, 0 steps\n"
    left_alone = "  not replaced: __main__.Own: it is derived from torch.optim.Adam\n"
    assert err == builds * report.format("SGD") + report.format("Adam") + left_alone


NESTED = """
import multiprocessing

import torch


class Own(torch.optim.Adam):
    pass


def inner():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def outer():
    Own([torch.nn.Parameter(torch.ones(2))])
    child = multiprocessing.get_context("spawn").Process(target=inner)
    child.start()
    child.join()


if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=outer)
    child.start()
    child.join()
"""


def test_a_child_of_a_child_swaps_and_one_with_a_class_of_its_own_reports(
    forking: Forking, tmp_path: Path
) -> None:
    (tmp_path / "nested.py").write_text(NESTED)
    environment = {**os.environ, "PYTHON_EXEC": str(forking.executable(tmp_path / "python"))}
    code, _, err = forking.run("-m", "dragon.vm.run", "nested.py", cwd=tmp_path, env=environment)
    assert code == 0, err
    inner = "dragon.vm.run: 1 optimizer replaced\n  torch.optim.SGD: 2 parameters in 1 tensor, 0 steps\n"
    outer = (
        "dragon.vm.run: no optimizer was replaced in this process\n"
        "  not replaced: __mp_main__.Own: it is derived from torch.optim.Adam\n"
    )
    assert err == inner + outer + NOTHING


def test_a_report_is_behind_what_the_script_has_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(both))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(both))
    print("done")
    with swap() as swapped:
        print_report(swapped)
    assert both.getvalue().split(b"\n", 1)[0] == b"done"
    assert both.getvalue().endswith(b"no optimizer was replaced in this process\n")


class Full(io.StringIO):
    """A file on a full disk."""

    def flush(self) -> None:
        raise OSError("no space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Full()], ids=["removed", "closed", "full"])
def test_a_report_that_cannot_be_printed_is_no_error(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with swap() as swapped:
        print_report(swapped)


@pytest.mark.parametrize("has_forks", [True, False])
def test_processes_that_start_after_a_run_swap_nothing(has_forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_forks:
        # As on Windows.
        monkeypatch.delattr(os, "register_at_fork")
    plain = multiprocessing.spawn.get_preparation_data
    with swap() as swapped:
        undo = include_children(swapped)
        assert "dragon.vm.run" in multiprocessing.spawn.get_preparation_data("child")
        undo()
    assert multiprocessing.spawn.get_preparation_data is plain
