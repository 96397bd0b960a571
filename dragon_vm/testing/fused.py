"""PyTorch's own fused CPU step from a given start: what native arithmetic of the same precision achieves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .records import AdamOptions, AdamState, SGDOptions, SGDState, StateT, converted


def _clone(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy to a contiguous CPU tensor: the fused CPU operations are silently wrong for mixed strides."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())


def _as_stored(end: StateT, start: StateT) -> StateT:
    """Round each tensor to the dtype that it has in `start`, one that is not there to the parameter's."""
    values: list[Any] = [
        new.to(getattr(old, "dtype", start.param.dtype)) if isinstance(new, Tensor) else new
        for new, old in zip(end, start, strict=True)
    ]
    return type(end)(*values)


def _eps_for_torch(options: AdamOptions, step: float) -> float:
    """Return the eps with which PyTorch's form equals the epsilon-hat form at this step."""
    if not options.epsilon_hat or not options.betas[1]:
        return options.eps
    return options.eps / math.sqrt(-math.expm1(step * math.log(options.betas[1])))


def fused_adam_step(start: AdamState, grad: Tensor, options: AdamOptions, compute_dtype: torch.dtype) -> AdamState:
    """Run `torch._fused_adam_` (or `_fused_adamw_`) on contiguous CPU clones of a start.

    Args:
        start: State before the step; left as it is.
        grad: Gradient, the parameter's shape; left as it is.
        options: Hyperparameters. What PyTorch lacks is prepared outside of the operation: scaling and
            clipping of the gradient in `compute_dtype`, epsilon-hat by an equal eps.
        compute_dtype: float32, float64, bfloat16 or float16. The operation runs on tensors of this dtype.

    Returns:
        The state after the step, contiguous, each tensor rounded to the dtype it has in `start`.
    """
    gradient = _clone(grad, compute_dtype) * options.grad_scale
    if options.clip_value is not None:
        gradient = gradient.clamp(-options.clip_value, options.clip_value)
    end = converted(start, lambda tensor: _clone(tensor, compute_dtype))
    operation = torch._fused_adamw_ if options.decoupled_weight_decay else torch._fused_adam_
    operation(
        [end.param],
        [gradient],
        [end.exp_avg],
        [end.exp_avg_sq],
        [end.max_exp_avg_sq] if options.amsgrad and end.max_exp_avg_sq is not None else [],
        [torch.tensor(float(start.step + 1))],
        lr=options.lr,
        beta1=options.betas[0],
        beta2=options.betas[1],
        weight_decay=options.weight_decay,
        eps=_eps_for_torch(options, start.step + 1),
        amsgrad=options.amsgrad,
        maximize=options.maximize,
    )
    return _as_stored(end._replace(step=start.step + 1), start)


def fused_sgd_step(start: SGDState, grad: Tensor, options: SGDOptions, compute_dtype: torch.dtype) -> SGDState:
    """Run `torch._fused_sgd_` on contiguous CPU clones of a start; arguments as in `fused_adam_step`."""
    param, buffer = converted(start, lambda tensor: _clone(tensor, compute_dtype))
    if buffer is None:
        buffer = torch.zeros_like(param)
    torch._fused_sgd_(
        [param],
        [_clone(grad, compute_dtype)],
        [buffer] if options.momentum else [],
        **vars(options),
        is_first_step=start.momentum_buffer is None,
    )
    return _as_stored(SGDState(param, buffer if options.momentum else None), start)
