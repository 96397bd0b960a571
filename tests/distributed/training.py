"""Scenarios: training under a wrapper, beside PyTorch's optimizer under the same wrapper and beside one process."""

import copy
from typing import Any

import torch
import torch.distributed as dist

from .factories import largest_difference, make, params_of, whole
from .wrappers import WRAPPERS, EvenNet, Net, Wrapped, backward, backward_alone

N_STEPS = 4


def trained(wrapped: Wrapped, optimizer: Any, clip: float = 0.0) -> list[torch.Tensor]:
    for step in range(N_STEPS):
        # Larger and smaller than the bound on the norm, by turns.
        backward(wrapped, step, scale=1e-3 if step % 2 else 1.0)
        if clip:
            torch.nn.utils.clip_grad_norm_(params_of(optimizer), clip)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(param) for param in params_of(optimizer)]


def as_with_torch(kind: str, name: str) -> float:
    """How far parameters are from those that PyTorch's fused optimizer trains under the same wrapper."""
    expected_model, model = WRAPPERS[kind](), WRAPPERS[kind]()
    expected = trained(expected_model, make("torch", expected_model.groups))
    before = [whole(param) for group in model.groups for param in group["params"]]
    found = trained(model, make(name, model.groups))
    assert largest_difference(found, before) > 0.01, "nothing was trained"
    return largest_difference(found, expected)
