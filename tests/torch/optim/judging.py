"""Take steps with an optimizer that is in the middle of something, and judge each from its own start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dragon.vm.testing import AdamOptions, AdamState, adam_errors, assert_within_budget
from dragon.vm.testing.wide import real_view

Bits = tuple[Any, ...]


def place(backend: str | None, device: torch.device) -> torch.device:
    """Where a backend's parameters live in this test run."""
    return device if backend == "triton" else torch.device("cpu")


def make_params(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> list[torch.nn.Parameter]:
    """A few small parameters, the same each time."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((3, 5), (7,), (), (2, 3, 4))
    values = [torch.randn(shape, generator=generator, dtype=torch.complex128) for shape in shapes]
    if not dtype.is_complex:
        values = [value.real.contiguous() for value in values]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def set_grads(params: list[Any], number: int) -> None:
    """Give parameters the gradients of step `number`, the same each time."""
    generator = torch.Generator().manual_seed(number)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = grad.to(param.device, param.dtype)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def options_of(group: dict[str, Any]) -> AdamOptions:
    """A group's hyperparameters, of ours or of PyTorch's optimizer."""
    beta1, beta2 = map(float, group["betas"])
    return AdamOptions(
        lr=float(group["lr"]),
        betas=(beta1, beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        grad_scale=group.get("grad_scale", 1.0),
        epsilon_hat=group.get("epsilon_hat", False),
    )


def _plain(tensor: Tensor) -> Tensor:
    return real_view(tensor.detach().clone(memory_format=torch.contiguous_format).cpu())


def snapshot(param: Tensor, state: dict[str, Any], amsgrad: bool) -> AdamState:
    """Copy a parameter and its state; what it lacks is zero."""
    moments = [
        _plain(state.get(name, torch.zeros_like(param)))
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    ]
    return AdamState(_plain(param), float(state.get("step", 0)), moments[0], moments[1], (*moments, None)[2])


def snapshots(optimizer: torch.optim.Optimizer) -> list[AdamState]:
    return [
        snapshot(param, optimizer.state.get(param, {}), group["amsgrad"])
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def judged_step(
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Take a step and assert that it is as good as PyTorch's from the same start would be.

    A parameter without a gradient must keep its bits.
    """
    options = [options_of(group) for group in optimizer.param_groups for _ in group["params"]]
    params = params_of(optimizer)
    grads = [None if param.grad is None else _plain(param.grad) for param in params]
    before = snapshots(optimizer)
    (step or optimizer.step)()
    after = snapshots(optimizer)
    for index, grad in enumerate(grads):
        if grad is None:
            assert same_bits(before[index], after[index]), f"parameter {index} changed without a gradient"
        else:
            errors = adam_errors(before[index], grad, after[index], options[index], compute_dtype)
            assert_within_budget(errors, where=f"parameter {index}, {options[index]}")


def same_bits(left: Any, right: Any) -> bool:
    """Whether two tensors, numbers, or nests of them are equal bit by bit, dtype and shape included."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return torch.equal(_plain(left).reshape(-1).view(torch.uint8), _plain(right).reshape(-1).view(torch.uint8))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take a step for each number, with the gradients of that number."""
    for number in steps:
        set_grads(params_of(optimizer), number)
        optimizer.step()
