"""Adam, AdamW and AMSGrad in torch operations."""

from __future__ import annotations

import math
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
    host_number,
)
from dragon.vm.torch.optim._formats.bound import SLACK, clamp_moment, moment_bound

_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _state_keys(group: Group) -> tuple[str, ...]:
    return _STATES if group["amsgrad"] else _STATES[:2]


def _check(group: Group) -> None:
    check_lr(group)
    betas, eps = group["betas"], group["eps"]
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index in range(2):
        if not 0.0 <= betas[index] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {betas[index]}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for index in range(2):
        if isinstance(betas[index], Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError(
                    f"betas[{index}] as a Tensor is not supported for capturable=False and foreach=True"
                )
            if betas[index].numel() != 1:
                raise ValueError(f"Tensor betas[{index}] must be 1-element")


def _columns(group: Group) -> dict[str, float]:
    beta1, beta2 = map(host_number, group["betas"])
    return {
        "BOUND": _changed_bound(group) * SLACK,
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": float(group["eps"]),
        "EPSILON_HAT": float(group["epsilon_hat"]),
        "DECOUPLED": float(bool(group["decoupled_weight_decay"])),
    }


def one_minus_power(base: float, exponent: float) -> float:
    """1 - base**exponent without cancellation, for 0 <= base < 1 and exponent >= 1."""
    return -math.expm1(exponent * math.log(base)) if base > 0 else 1.0


def _complement_power(beta: float | Tensor, step: Tensor) -> float | Tensor:
    """1 - beta**step; a tensor if autograd must see it."""
    if isinstance(beta, Tensor) and beta.requires_grad:
        # A copy: the next step counts in place.
        return 1 - beta ** step.to(beta.device, copy=True)
    return one_minus_power(float(beta), float(step))


def _changed_bound(group: Group) -> float:
    """The bound of the first moment since the betas of a group have changed; 0 if they never did."""
    betas: Sequence[float] = group.get("bound_betas") or ()
    return float(betas[2]) if len(betas) > 2 else 0.0


def adam_update(
    param: Tensor, grad: Tensor, states: Sequence[Tensor], step: Tensor | None, group: Group, maths: Maths
) -> tuple[Tensor, list[Tensor]]:
    """One step of Adam; see `dragon.kernels.adam.adam_update` for the formula and its sources.

    States are exp_avg, exp_avg_sq and, for AMSGrad, max_exp_avg_sq. For the arguments see `Algorithm.update`.
    """
    assert step is not None
    lr, beta1, beta2, eps = (for_maths(param, value) for value in (group["lr"], *group["betas"], group["eps"]))
    correction2 = _complement_power(beta2, step) ** 0.5
    step_size = lr * correction2 / _complement_power(beta1, step)
    denom_eps = eps if group["epsilon_hat"] else eps * correction2
    param, grad = decayed(param, grad, group, lr, group["decoupled_weight_decay"])
    exp_avg = beta1 * states[0] + (1 - beta1) * grad
    exp_avg_sq = beta2 * states[1] + (1 - beta2) * grad * grad
    largest = torch.maximum(states[2], exp_avg_sq) if group["amsgrad"] else exp_avg_sq
    root = maths.root(largest)
    if maths.is_bounded:
        own_root = maths.root(exp_avg_sq) if group["amsgrad"] else root
        bound = _changed_bound(group) or moment_bound(float(beta1), float(beta2), float(step))
        exp_avg = clamp_moment(exp_avg, own_root, bound)
    param = param - step_size * (exp_avg / (root + denom_eps))
    return param, [exp_avg, exp_avg_sq, largest] if group["amsgrad"] else [exp_avg, exp_avg_sq]


def _fused(
    params: Tensors,
    grads: Tensors,
    states: list[Tensors],
    steps: Tensors,
    group: Group,
    numbers: dict[str, Any],
    step: float,
) -> None:
    if group["epsilon_hat"] and numbers["eps"]:
        # The operation divides sqrt(v) by the correction before it adds its epsilon.
        numbers = {**numbers, "eps": numbers["eps"] / math.sqrt(one_minus_power(numbers["beta2"], step))}
    operation = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    exp_avgs, exp_avg_sqs, *maxima = states
    largest = maxima[0] if maxima else []
    operation(params, grads, exp_avgs, exp_avg_sqs, largest, steps, lr=float(group["lr"]), **numbers)


def _fused_numbers(group: Group) -> dict[str, Any]:
    beta1, beta2 = map(float, group["betas"])
    return {"beta1": beta1, "beta2": beta2, "eps": float(group["eps"]), "amsgrad": bool(group["amsgrad"])}


ADAM = Algorithm(
    name="adam",
    states=_STATES,
    state_keys=_state_keys,
    counts_steps=lambda group: True,
    check=_check,
    columns=_columns,
    update=adam_update,
    fused=_fused,
    fused_numbers=_fused_numbers,
    fused_names=("betas", "eps", "weight_decay", "amsgrad", "epsilon_hat", "decoupled_weight_decay"),
    depends_on_step=lambda group: bool(group["epsilon_hat"] and group["eps"]),
    # Betas that a narrow group had: what the bound must allow for.
    own_group_defaults={"bound_betas": None},
    # Nor has a saved group that knows nothing of AMSGrad its maximum.
    optional_keys=lambda saved_group: frozenset() if "amsgrad" in saved_group else frozenset({"max_exp_avg_sq"}),
)
