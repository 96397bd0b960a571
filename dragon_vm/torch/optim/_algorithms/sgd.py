"""SGD with PyTorch's form of momentum, in torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import (
    Algorithm,
    Group,
    Maths,
    Tensors,
    check_lr,
    decayed,
    for_maths,
)

_STATES = ("momentum_buffer",)


def _state_keys(group: Group) -> tuple[str, ...]:
    return _STATES if group["momentum"] else ()


def _counts_steps(group: Group) -> bool:
    """The first gradient enters the buffer undamped: only with dampening does the count matter."""
    return bool(group["momentum"] and group["dampening"])


def _check(group: Group) -> None:
    check_lr(group)
    if not group["momentum"] >= 0.0:
        raise ValueError(f"Invalid momentum value: {group['momentum']}")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def _columns(group: Group) -> dict[str, float]:
    numbers = {name.upper(): float(group[name]) for name in ("momentum", "dampening")}
    return {**numbers, "NESTEROV": float(bool(group["nesterov"]))}


def sgd_update(
    param: Tensor, grad: Tensor, states: Sequence[Tensor], step: Tensor | None, group: Group, maths: Maths
) -> tuple[Tensor, list[Tensor]]:
    """One step of SGD; see `dragon.kernels.sgd.sgd_update` for the formula.

    With momentum the buffer is a state. For the arguments see `Algorithm.update`; there is no root here, and
    nothing to bound.
    """
    lr, momentum, dampening = (for_maths(param, group[name]) for name in ("lr", "momentum", "dampening"))
    param, grad = decayed(param, grad, group, lr, False)
    if momentum == 0:
        return param - lr * grad, []
    gain = 1.0 if step is None or step <= 1 else 1 - dampening
    buffer = momentum * states[0] + gain * grad
    direction = grad + momentum * buffer if group["nesterov"] else buffer
    return param - lr * direction, [buffer]


def _fused(
    params: Tensors,
    grads: Tensors,
    states: list[Tensors],
    steps: Tensors,
    group: Group,
    numbers: dict[str, Any],
    step: float,
) -> None:
    buffers = states[0] if states else []
    # The fused operation is wrong by whole gradients for half precision of 15 elements and more (torch 2.13).
    half = params[0].dtype in (torch.float16, torch.bfloat16)
    wide = [[t.float() for t in tensors] if half else tensors for tensors in (params, grads, buffers)]
    torch._fused_sgd_(*wide, lr=float(group["lr"]), is_first_step=step == 1, **numbers)
    if half:
        # What the operation writes: the gradients only where it scales them.
        scaled = (grads, wide[1]) if numbers["grad_scale"] is not None else ([], [])
        torch._foreach_copy_([*params, *buffers, *scaled[0]], [*wide[0], *wide[2], *scaled[1]])


def _fused_numbers(group: Group) -> dict[str, Any]:
    numbers = {name: float(group[name]) for name in ("momentum", "dampening")}
    return {**numbers, "nesterov": bool(group["nesterov"])}


SGD = Algorithm(
    name="sgd",
    states=_STATES,
    state_keys=_state_keys,
    counts_steps=_counts_steps,
    check=_check,
    columns=_columns,
    update=sgd_update,
    fused=_fused,
    fused_numbers=_fused_numbers,
    fused_names=("momentum", "dampening", "nesterov", "weight_decay"),
    depends_on_step=_counts_steps,
    # PyTorch's SGD does not count; its buffer is there after the first step, with momentum.
    optional_keys=lambda saved_group: frozenset({"momentum_buffer"}),
    uncounted_steps=1.0,
    saves_steps=False,
    own_group_defaults={"capturable": False, "stochastic_rounding": False},
)
