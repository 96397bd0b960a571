"""PyTorch's own fused CPU step from a given start: what native arithmetic of the same precision achieves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .records import AdamOptions, AdamState, SGDOptions, SGDState


def _clone(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy to a contiguous CPU tensor: the fused CPU operations are silently wrong for mixed strides."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())


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
    param = _clone(start.param, compute_dtype)
    exp_avg, exp_avg_sq = _clone(start.exp_avg, compute_dtype), _clone(start.exp_avg_sq, compute_dtype)
    maximum = None if start.max_exp_avg_sq is None else _clone(start.max_exp_avg_sq, compute_dtype)
    operation = torch._fused_adamw_ if options.decoupled_weight_decay else torch._fused_adam_
    operation(
        [param],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [maximum] if options.amsgrad and maximum is not None else [],
        [torch.tensor(float(start.step + 1))],
        lr=options.lr,
        beta1=options.betas[0],
        beta2=options.betas[1],
        weight_decay=options.weight_decay,
        eps=_eps_for_torch(options, start.step + 1),
        amsgrad=options.amsgrad,
        maximize=options.maximize,
    )
    return AdamState(
        param.to(start.param.dtype),
        start.step + 1,
        exp_avg.to(start.exp_avg.dtype),
        exp_avg_sq.to(start.exp_avg_sq.dtype),
        None if maximum is None or start.max_exp_avg_sq is None else maximum.to(start.max_exp_avg_sq.dtype),
    )


def fused_sgd_step(start: SGDState, grad: Tensor, options: SGDOptions, compute_dtype: torch.dtype) -> SGDState:
    """Run `torch._fused_sgd_` on contiguous CPU clones of a start; arguments as in `fused_adam_step`."""
    param, gradient = _clone(start.param, compute_dtype), _clone(grad, compute_dtype)
    is_first_step = start.momentum_buffer is None
    buffer = torch.zeros_like(param)
    if start.momentum_buffer is not None:
        buffer = _clone(start.momentum_buffer, compute_dtype)
    torch._fused_sgd_(
        [param],
        [gradient],
        [buffer] if options.momentum else [],
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        lr=options.lr,
        dampening=options.dampening,
        nesterov=options.nesterov,
        maximize=options.maximize,
        is_first_step=is_first_step,
    )
    state_dtype = start.param.dtype if start.momentum_buffer is None else start.momentum_buffer.dtype
    return SGDState(param.to(start.param.dtype), buffer.to(state_dtype) if options.momentum else None)
