"""Calls that the native backend planned for one step are used again by those steps alone that they fit."""

import copy
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam

from .support import bits, numbers


def step(params: list[torch.nn.Parameter], optimizer: Adam, number: int, how: dict[str, Any]) -> None:
    """A step with the loss scale, the size of gradients and the steps of one parameter that are asked for."""
    optimizer.state[params[how.get("whose", 1)]]["step"] += how.get("counts", 0)
    vars(optimizer).update(grad_scale=torch.tensor(how.get("scale", 1.0)), found_inf=torch.tensor(0.0))
    for i, param in enumerate(params):
        param.grad = numbers(10 * number + i, 5) * how.get("size", 1.0)
    optimizer.step(zero_grad=how.get("zero_grad", False))


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"epsilon_hat": True}, {}, {"counts": 5}),
        # Two of three have one count, first the first and the last one.
        ({"epsilon_hat": True}, {"counts": 5}, {"counts": 5, "whose": 0}),
        ({"clip_norm": 1.0}, {}, {"size": 100.0}),
        ({}, {"scale": 4.0, "zero_grad": True}, {"scale": 8.0, "zero_grad": True}),
    ],
)
def test_a_step_that_differs_from_the_last_one_has_calls_of_its_own(
    options: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    params = [torch.nn.Parameter(numbers(i, 5)) for i in range(3)]
    optimizer = Adam(params, lr=0.1, backend="native", **options)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    step(params, optimizer, 0, first)
    # A copy has no calls yet.
    twins, twin = copy.deepcopy((params, optimizer))
    for own, each in ((params, optimizer), (twins, twin)):
        step(own, each, 1, second)
    for param, other in zip(params, twins, strict=True):
        assert bits(param) == bits(other)
        assert bits(param.grad) == bits(other.grad)


@pytest.mark.parametrize(
    "other",
    [
        *({"lr": 0.2}, {"weight_decay": 0.1}, {"eps": 1e-3}, {"betas": (0.5, 0.999)}, {"maximize": True}),
        *({"grad_scale": 0.5}, {"clip_value": 0.1}, {"clip_norm": 1e3}, {"epsilon_hat": True}, {"n_steps": 5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("common", [{}, {"epsilon_hat": True, "clip_value": 0.5}], ids=str)
def test_groups_that_differ_in_one_number_are_updated_as_by_optimizers_of_their_own(
    common: dict[str, Any], other: dict[str, Any]
) -> None:
    found = []
    for are_apart in (False, True):
        params = [torch.nn.Parameter(numbers(i, 5)) for i in range(2)]
        groups = [{"params": [param], "lr": 0.1, **common} for param in params]
        groups[1] |= {name: value for name, value in other.items() if name != "n_steps"}
        optimizers = [Adam([group], backend="native") for group in groups] if are_apart else [Adam(groups)]
        for number in range(3):
            for i, param in enumerate(params):
                param.grad = numbers(10 * number + i, 5)
            for optimizer in optimizers:
                optimizer.step()
            if number == 0:
                optimizers[-1].state[params[1]]["step"] += other.get("n_steps", 0)
        found.append(list(map(bits, params)))
    assert found[0] == found[1]
