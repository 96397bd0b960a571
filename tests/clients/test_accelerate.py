import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import AdamW

from ..forking import Forking
from .training import STEPS, assert_same_training, batches, model, ours, theirs

accelerate = pytest.importorskip("accelerate", reason="the clients extra is not installed")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its precision for the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    def __init__(self, make: Any, precision: str) -> None:
        self.accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
        network = model()
        optimizer = make(network.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(network, optimizer, scheduler)
        self.losses: list[float] = []

    def train(self, data: Any) -> "Run":
        for inputs, targets in data:
            loss = torch.nn.functional.mse_loss(self.model(inputs), targets)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerator_loses_the_same_with_ours(precision: str) -> None:
    runs = []
    for make in (ours, theirs):
        runs.append(Run(make, precision).train(batches()))
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert isinstance(runs[0].optimizer.optimizer, AdamW)
    assert_same_training(runs[0].losses, runs[1].losses, rtol=1e-4 if precision == "no" else 2e-2)


def test_an_accelerator_saves_and_resumes_ours(tmp_path: Path) -> None:
    data = batches()
    full = Run(ours, "no").train(data)
    half = Run(ours, "no").train(data[: STEPS // 2])
    half.accelerator.save_state(str(tmp_path))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Run(ours, "no")
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.train(data[STEPS // 2 :]).losses == full.losses[STEPS // 2 :]


SCRIPT = """
import torch
from accelerate import Accelerator

optimizer = Accelerator().prepare(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
optimizer.step()
print(type(optimizer.optimizer).__module__)
"""


def test_its_launcher_runs_an_unmodified_script_with_ours(forking: Forking, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    environment = {
        **os.environ,
        "ACCELERATE_LOG_LEVEL": "error",
        "HF_HOME": str(tmp_path),
        "PYTHON_EXEC": str(forking.executable(tmp_path / "python")),
    }
    ended = forking.run(*launcher, "--module", "dragon.vm.run", "train.py", cwd=tmp_path, env=environment)
    assert ended.code == 0, ended.err
    assert ended.out == "dragon.vm.torch.optim.adam\n"
    assert "torch.optim.AdamW: 2 parameters in 1 tensor, 1 step" in ended.err
