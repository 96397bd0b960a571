import os
from pathlib import Path

import pytest

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
        "param = torch.nn.Parameter(torch.ones(2))\n"
        "torch.optim.Adam([param])\n"
        "if os.fork(): os.wait()\n"
        f"elif {builds}: torch.optim.SGD([param])\n"
    )
    code, _, err = forking.run("-m", "dragon.vm.run", "forked.py", cwd=tmp_path)
    assert code == 0, err
    report = "dragon.vm.run: 1 optimizer replaced\n  torch.optim.{}: 2 parameters in 1 tensor, 0 steps\n"
    assert err == builds * report.format("SGD") + report.format("Adam")
