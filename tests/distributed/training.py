"""Scenarios: training under a wrapper, beside PyTorch's optimizer under the same wrapper and beside one process."""

from typing import Any

import torch

from .factories import largest_difference, make, params_of, whole
from .wrappers import WRAPPERS, EvenNet, Net, Wrapped, backward, backward_alone

N_STEPS = 4
EVEN = ("tp", "sp", "fsdp2 and tp")


# Far above gradients whose sums are rounding errors: Adam would make whole steps of them.
DAMPED = {"eps": 1e-2}


def trained(wrapped: Wrapped, optimizer: Any) -> list[torch.Tensor]:
    for step in range(N_STEPS):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(param) for param in params_of(optimizer)]


def names(wrapped: Wrapped) -> list[str]:
    """The names of the parameters, in the order of the groups, as the model alone has them."""
    found = {id(param): name for name, param in wrapped.model.named_parameters()}
    ordered = [found[id(param)] for group in wrapped.groups for param in group["params"]]
    return [name.replace("module.", "").replace("_fsdp_wrapped_", "") for name in ordered]


def as_with_torch(kind: str, name: str) -> float:
    """How far parameters are from those that PyTorch's fused optimizer trains under the same wrapper."""
    expected_model, model = WRAPPERS[kind](), WRAPPERS[kind]()
    expected = trained(expected_model, make("torch", expected_model.groups))
    before = [whole(param) for group in model.groups for param in group["params"]]
    found = trained(model, make(name, model.groups))
    assert largest_difference(found, before) > 0.01, "nothing was trained"
    return largest_difference(found, expected)


def as_alone(kind: str, name: str) -> float:
    """How far parameters are from those that one process trains with PyTorch's optimizer and all the data."""
    wrapped = WRAPPERS[kind]()
    found = dict(zip(names(wrapped), trained(wrapped, make(name, wrapped.groups, **DAMPED)), strict=True))
    model = EvenNet() if kind in EVEN else Net()
    optimizer = make("torch", model.parameters(), **DAMPED)
    for step in range(N_STEPS):
        backward_alone(model, wrapped.n_replicas, step)
        optimizer.step()
        optimizer.zero_grad()
    expected = {key: value.detach() for key, value in model.named_parameters()}
    return largest_difference([found[key] for key in expected], list(expected.values()))
