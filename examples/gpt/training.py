"""Train one GPT in one mode, and keep what modes are compared by."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from examples.clock import timed
from examples.gpt.model import GPT, loss_of, text, windows_of
from examples.gpt.modes import Mode

BATCH = 16
N_HELD_OUT = 256  # windows
WARM_UP_STEPS = 5  # not timed: they compile kernels and allocate the optimizer's states


@dataclass(frozen=True)
class Run:
    """What one mode did."""

    losses: list[float]  # of each step, in nats
    held_out_loss: float
    n_params: int
    weight_bytes: int
    state_bytes: int
    step_ms: float  # median of `optimizer.step()`

    @property
    def bytes_per_param(self) -> float:
        """Bytes of weights and states together, without gradients."""
        return (self.weight_bytes + self.state_bytes) / self.n_params


def train(mode: Mode, n_steps: int, seed: int, device: torch.device, on_step: Callable[[], None]) -> Run:
    """Train a fresh GPT; the same seed gives the same start and the same batches in any mode."""
    torch.manual_seed(seed)
    model = GPT().to(device, mode.dtype)
    optimizer = mode.build(model)
    learnt, held_out = text()
    batches = torch.Generator().manual_seed(seed)
    losses, times = [], []
    for _ in range(n_steps):
        loss = loss_of(model, windows_of(learnt, BATCH, batches).to(device))
        loss.backward()
        times.append(timed(optimizer.step, device))
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step()
    unseen = windows_of(held_out, N_HELD_OUT, torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        held_out_loss = loss_of(model, unseen).item()
    params = list(model.parameters())
    return Run(
        losses=losses,
        held_out_loss=held_out_loss,
        n_params=sum(param.numel() for param in params),
        weight_bytes=sum(param.nbytes for param in params),
        state_bytes=state_bytes(optimizer),
        step_ms=statistics.median(times[WARM_UP_STEPS:] or times),
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the memory of an optimizer's states, without the step counts, in bytes."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step" and isinstance(value, torch.Tensor)
    )
