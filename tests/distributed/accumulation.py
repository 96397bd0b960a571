"""Scenarios: gradients that several backward passes sum before they are reduced."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .factories import largest_difference, make, params_of, whole
from .training import DAMPED, EVEN, N_STEPS, names
from .watching import Watch
from .wrappers import WRAPPERS, EvenNet, Net, backward, backward_alone

N_PARTS = 3
# The gradients of all parameters, in bytes: what one reduction of them moves.
LARGE = 256


def accumulated(kind: str, name: str, is_last_synchronized: bool = True, **options: Any) -> tuple[float, int]:
    """How far parameters are from one process's with the sum of all parts, and large collectives in a step."""
    wrapped, model = WRAPPERS[kind](), EvenNet() if kind in EVEN else Net()
    optimizer = make(name, wrapped.groups, **DAMPED, **options)
    expected = make("clipping", model.parameters(), **DAMPED, **options)
    for step in range(N_STEPS):
        with Watch() as watch:
            for part in range(N_PARTS):
                is_last = part == N_PARTS - 1
                with nullcontext() if is_last and is_last_synchronized else wrapped.unsynchronized():
                    backward(wrapped, step, part)
                if name != "clipping":
                    optimizer.sum_grad()
            optimizer.step()
        optimizer.zero_grad()
        for part in range(N_PARTS):
            backward_alone(model, wrapped.n_replicas, step, part)
        expected.step()
        expected.zero_grad()
    found = dict(zip(names(wrapped), map(whole, params_of(optimizer)), strict=True))
    pairs = [(found[key], value.detach()) for key, value in model.named_parameters()]
    n_large = sum(nbytes > LARGE for operation, nbytes in watch.collectives if operation.startswith("allreduce"))
    return largest_difference(*map(list, zip(*pairs, strict=True))), n_large


def half_precision_sums(name: str) -> float:
    """Sums of bf16 gradients are kept in float32 until the step."""
    param = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    model = nn.parallel.DistributedDataParallel(_Scaled(param))
    optimizer = make(name, model.parameters())
    for _ in range(300):
        with model.no_sync():
            model(torch.ones(8, dtype=torch.bfloat16)).sum().backward()
        optimizer.sum_grad()
    optimizer.step()
    # The first moment is a tenth of the gradient. A bf16 sum of ones stays at 256.
    return float(optimizer.state[param]["exp_avg"][0]) / 0.1


class _Scaled(nn.Module):
    def __init__(self, param: nn.Parameter) -> None:
        super().__init__()
        self.param = param

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.param * x
