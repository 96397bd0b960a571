"""A small task that every framework is given, once with PyTorch's AdamW and once with ours."""

import math
from typing import Any

import torch

from dragon.vm.torch.optim import AdamW

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
STEPS = 24


def ours(params: Any, **options: Any) -> torch.optim.Optimizer:
    return AdamW(params, **OPTIONS, **options)


def theirs(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **OPTIONS, **options)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def batches(n_batches: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 8, generator=generator) for _ in range(n_batches)]
    return [(x, x.sin().sum(1, keepdim=True)) for x in inputs]


def assert_same_training(losses: list[float], expected: list[float], rtol: float = 1e-4) -> None:
    """The losses agree to rounding errors, and are losses of a model that learns."""
    assert len(losses) == len(expected) >= 8
    assert all(map(math.isfinite, expected))
    assert len(set(expected)) > len(expected) // 2
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=rtol, atol=1e-6)
