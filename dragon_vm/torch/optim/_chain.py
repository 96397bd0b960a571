"""What happens to the gradients before an update, in torch operations: unscale, clip, check.

The triton backend does the same inside its kernels; see `dragon.kernels.norm` and `dragon.kernels.advance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import as_real
from dragon.vm.torch.optim._options import Settings

# `torch.nn.utils.clip_grad_norm_` divides by the norm plus this.
CLIP_EPS = 1e-6


class Scaling(NamedTuple):
    """What a `GradScaler` hands to an optimizer.

    Attributes:
        grad_scale: fp32 [1], gradients are divided by it; None for 1.
        found_inf: fp32 [1], positive if the step is to be skipped; None for 0.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Factors(NamedTuple):
    """What to do with the gradients of one step.

    Attributes:
        skip: leave parameters, states and counters alone.
        factors: what to multiply each gradient by; negative to maximise.
        common: the part of them that is the same for all gradients.
        norm: the norm of all gradients together, float64 0-dim; None if nothing asked for it.
    """

    skip: bool
    factors: list[float]
    common: float
    norm: Tensor | None


def needs_norm(settings: Settings) -> bool:
    """Whether the options ask for the norm of all gradients."""
    return bool(settings.max_grad_norm) or settings.skip_nonfinite


def group_factor(group: dict[str, Any]) -> float:
    """The factor of a group's gradients: its `grad_scale`, negative to maximise."""
    scale = float(group["grad_scale"])
    return -scale if group["maximize"] else scale


def _norms(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Norm of each gradient, float64 [n] on the CPU; accurate where squares leave the range of fp32."""
    real = [as_real(grad) for grad in grads]
    norms = torch._foreach_norm(real, norm_type, dtype=torch.float64)
    return torch.stack([norm.cpu() for norm in norms])


def gradient_factors(
    grads: Sequence[Tensor],
    rows: Sequence[int],
    groups: Sequence[dict[str, Any]],
    settings: Settings,
    scaling: Scaling,
) -> Factors:
    """Decide by what each gradient is multiplied, and whether the step is skipped.

    Args:
        grads: gradients.
        rows: index of each one's parameter group.
        groups: parameter groups.
        settings: the optimizer's.
        scaling: a `GradScaler`'s; read here, which synchronises on an accelerator.
    """
    skip = scaling.found_inf is not None and float(scaling.found_inf) > 0
    common = 1.0 if scaling.grad_scale is None else 1.0 / float(scaling.grad_scale)
    own = [group_factor(groups[row]) for row in rows]
    limits = [float(groups[row]["clip_norm"]) for row in rows]
    total = None
    if needs_norm(settings):
        norms = _norms(grads, settings.norm_type) * torch.tensor(own, dtype=torch.float64).abs() * common
        total = norms.max() if settings.norm_type == math.inf else norms.square().sum().sqrt()
        skip = skip or (settings.skip_nonfinite and not math.isfinite(total))
        common *= _clip_factor(float(total), settings.max_grad_norm, CLIP_EPS)
    factors = [factor * common for factor in own]
    if any(limits):
        norms = _norms(grads, 2.0) * torch.tensor(factors, dtype=torch.float64).abs()
        factors = [
            factor * _clip_factor(norm, limit, 0.0)
            for factor, norm, limit in zip(factors, norms.tolist(), limits, strict=True)
        ]
    return Factors(skip, factors, common, total)


def _clip_factor(norm: float, limit: float, eps: float) -> float:
    """Limit / (norm + eps), at most 1; 1 without a limit, NaN for a NaN norm."""
    if not limit or norm + eps <= limit:
        return 1.0
    return limit / (norm + eps)


def clip_value(group: dict[str, Any]) -> float:
    """The bound of a group's gradient elements; 0 for none. `clip_norm` overrides it."""
    return 0.0 if group["clip_norm"] else float(group["clip_value"])


def zero_all(grads: Sequence[Tensor]) -> None:
    """Set gradients to zero, all strided ones in one operation, and detach them from any graph."""
    strided = []
    for grad in grads:
        if grad.grad_fn is not None:
            grad.detach_()
        elif grad.requires_grad:
            grad.requires_grad_(False)
        if grad.layout == torch.strided:
            strided.append(grad)
        else:
            grad.zero_()
    if strided:
        torch._foreach_zero_(strided)
