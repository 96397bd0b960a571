"""Gradients that are hard on narrow moments: the largest update, and what a second moment cannot forget."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory.modes import BETAS, Mode, trained

NUMEL = 4096  # the least that is stored in 8 bits
LR = 1e-3

HISTORIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "one element in 64 x 1000": lambda value, _: value * torch.where(torch.arange(NUMEL) % 64 == 0, 1e3, 1.0),
    "sparse elements": lambda value, _: value * (torch.rand(NUMEL) < 0.1),
    "sparse rows": lambda value, _: value * (torch.rand(NUMEL // 64) < 0.1).repeat_interleave(64),
    "zeros after 50 steps": lambda value, step: value * (step < 50),
    "x 1e-12": lambda value, _: value * 1e-12,
    "x 1e15": lambda value, _: value * 1e15,
}


def largest_update(mode: Mode, history: str, steps: int = 150) -> float:
    """The largest update, in learning rates: at most 7.27 for exact Adam."""
    torch.manual_seed(0)
    param = torch.zeros(NUMEL // 64, 64)
    optimizer = trained([param], mode)
    largest = 0.0
    for step in range(steps):
        # From 0 an update loses nothing to the rounding of a large parameter.
        param.zero_()
        param.grad = HISTORIES[history](torch.randn(NUMEL), step).view_as(param)
        optimizer.step(LR)
        largest = max(largest, float(param.abs().nan_to_num(math.inf).max()) / LR)
    return largest


def forgetting(mode: Mode, steps: int = 4000) -> float:
    """Median of sqrt(v / exact v) after half of each block's gradients got 100 times smaller."""
    torch.manual_seed(0)
    quiet = torch.arange(NUMEL) % 2 == 1
    param = torch.zeros(NUMEL // 64, 64)
    optimizer = trained([param], mode)
    exact = torch.zeros(NUMEL, dtype=torch.float64)
    for step in range(1000 + steps):
        gradient = torch.randn(NUMEL) * torch.where(quiet & (step >= 1000), 0.01, 1.0)
        param.grad = gradient.view_as(param)
        optimizer.step(0.0)
        exact = BETAS[1] * exact + (1 - BETAS[1]) * gradient.double() ** 2
    return float((optimizer.second_moment().view(-1).double() / exact).sqrt()[quiet].median())
