"""The eager backend: the updates in plain torch operations, one tensor at a time.

This is the readable specification. It runs on any device, takes any layout and complex tensors, and autograd sees
through it if asked to. It computes in fp32 for bf16 and fp16 tensors and reads counters, so on an accelerator it
synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._chain import Factors, clip_value
from dragon.vm.torch.optim._flatten import FlattenedGroup, State
from dragon.vm.torch.optim._layout import as_real
from dragon.vm.torch.optim._scalars import one_minus_power

Group = dict[str, Any]


def _maths_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which a parameter's update is computed, as in the kernels."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The real view of a tensor in the dtype of the maths; a copy if autograd may keep it."""
    real = as_real(tensor)
    if real.dtype != dtype:
        return real.to(dtype)
    return real.clone() if torch.is_grad_enabled() else real


def _write(target: Tensor, value: Tensor) -> None:
    if value is not target:
        target.copy_(value)


def _decayed(param: Tensor, grad: Tensor, group: Group, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay, out of place."""
    weight_decay = _on(param.device, group["weight_decay"])
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if decoupled:
            param = param * (1 - group["lr"] * weight_decay)
        else:
            grad = grad + weight_decay * param
    return param, grad


def _complement_power(beta: float | Tensor, step: Tensor) -> float | Tensor:
    """1 - beta**step; a tensor if autograd must see it."""
    if isinstance(beta, Tensor) and beta.requires_grad:
        return 1 - beta ** step.to(beta.device)
    return one_minus_power(float(beta), float(step))


def _on(device: torch.device, value: float | Tensor) -> float | Tensor:
    """A hyperparameter for use with tensors of a device: a float, unless autograd must see it."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.reshape(()).to(device)
    return float(value)


def adam_step(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """One step of Adam; see `dragon.kernels.adam.adam_update` for the formula and its sources.

    Args:
        param: updated in place; real or complex.
        grad: of the parameter's shape, already scaled and clipped.
        state: "step", counted up, "exp_avg", "exp_avg_sq" and, for AMSGrad, "max_exp_avg_sq", updated in place.
        group: the parameter group's hyperparameters.
    """
    step, exp_avg, exp_avg_sq = state["step"], as_real(state["exp_avg"]), as_real(state["exp_avg_sq"])
    device, dtype = param.device, _maths_dtype(param)
    lr, beta1, beta2 = (_on(device, value) for value in (group["lr"], *group["betas"]))
    step += 1
    correction1 = _complement_power(beta1, step)
    correction2 = _complement_power(beta2, step) ** 0.5

    target = as_real(param)
    value, grad = _decayed(
        _wide(target, dtype), _wide(grad, dtype), {**group, "lr": lr}, group["decoupled_weight_decay"]
    )
    wide_avg, wide_avg_sq = _wide(exp_avg, dtype), _wide(exp_avg_sq, dtype)
    new_avg = beta1 * wide_avg + (1 - beta1) * grad
    new_avg_sq = beta2 * wide_avg_sq + (1 - beta2) * grad * grad
    largest = new_avg_sq
    if group["amsgrad"]:
        max_exp_avg_sq = as_real(state["max_exp_avg_sq"])
        largest = torch.maximum(_wide(max_exp_avg_sq, dtype), new_avg_sq)
        _write(max_exp_avg_sq, largest)
    eps = group["eps"] if group["epsilon_hat"] else group["eps"] * correction2
    denom = largest.sqrt() + eps
    _write(exp_avg, new_avg)
    _write(exp_avg_sq, new_avg_sq)
    _write(target, value - (lr * correction2 / correction1) * (new_avg / denom))


def sgd_step(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """One step of SGD; see `dragon.kernels.sgd.sgd_update` for the formula.

    Args:
        param: updated in place.
        grad: of the parameter's shape, already scaled and clipped.
        state: with momentum, "step", counted up, and "momentum_buffer", updated in place.
        group: the parameter group's hyperparameters.
    """
    target, lr, momentum = as_real(param), _on(param.device, group["lr"]), group["momentum"]
    dtype = _maths_dtype(param)
    value, grad = _decayed(_wide(target, dtype), _wide(grad, dtype), {**group, "lr": lr}, False)
    if momentum != 0:
        step, buffer = state["step"], as_real(state["momentum_buffer"])
        step += 1
        gain = 1 - group["dampening"] if step > 1 else 1.0
        new_buffer = momentum * _wide(buffer, dtype) + gain * grad
        _write(buffer, new_buffer)
        grad = grad + momentum * new_buffer if group["nesterov"] else new_buffer
    _write(target, value - lr * grad)


def move_average(param: Tensor, state: State, decay: float) -> None:
    """Move the average of the parameter, `state["ema"]`, towards it by ``1 - decay``."""
    ema, dtype = as_real(state["ema"]), _maths_dtype(param)
    wide = _wide(ema, dtype)
    _write(ema, wide + (1 - decay) * (_wide(param, dtype) - wide))


_STEPS = {"adam": adam_step, "sgd": sgd_step}


class EagerGroup:
    """One flattened group, updated one tensor at a time.

    Args:
        group: the tensors.
        algorithm: "adam" or "sgd".
    """

    def __init__(self, group: FlattenedGroup, algorithm: str) -> None:
        self.group, self._step = group, _STEPS[algorithm]

    def update(
        self,
        grads: Sequence[Tensor],
        groups: Sequence[Group],
        numbers: list[tuple[Any, ...]],
        factors: Factors,
    ) -> None:
        """Update the tensors.

        Args:
            grads: gradients.
            groups: all parameter groups of the optimizer.
            numbers: their hyperparameters, comparable; unused, since nothing is kept from step to step.
            factors: of the gradients.
        """
        member = self.group
        members = zip(member.params, grads, member.states, member.rows, member.indices, strict=True)
        for param, grad, state, row, index in members:
            group = groups[row]
            factor = factors.of(index, group)
            bound = clip_value(group)
            ready = grad
            if factor != 1 or bound:
                ready = _wide(grad, _maths_dtype(param)) * factor
            if bound:
                ready = ready.clamp(-bound, bound)
            self._step(param, ready, state, group)
            if group["ema_decay"]:
                move_average(param, state, group["ema_decay"])
