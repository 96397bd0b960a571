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
        norm: the norm of all gradients together, float64 0-dim; None if nothing asked for it.
    """

    skip: bool
    factors: list[float]
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
    inverse_scale = 1.0 if scaling.grad_scale is None else 1.0 / float(scaling.grad_scale)
    by_group = [group_factor(group) * inverse_scale for group in groups]
    factors = [by_group[row] for row in rows]
    limits = [groups[row]["clip_norm"] for row in rows]
    total = None
    if grads and (needs_norm(settings) or any(limits)):
        kind = settings.norm_type if needs_norm(settings) else 2.0
        norms = _norms(grads, kind) * torch.tensor(factors, dtype=torch.float64).abs()
        if needs_norm(settings):
            total = norms.max() if kind == math.inf else norms.square().sum().sqrt()
            skip = skip or (settings.skip_nonfinite and not math.isfinite(total))
            if settings.max_grad_norm:
                factor = float((settings.max_grad_norm / (total + CLIP_EPS)).clamp(max=1.0))
                factors = [each * factor for each in factors]
        if any(limits):
            each_norm = norms.tolist() if kind == 2.0 else (_norms(grads, 2.0)).tolist()
            factors = [
                factor
                * (limit / max(norm, limit) if limit and not math.isnan(norm) else 1.0 if not limit else norm)
                for factor, limit, norm in zip(factors, limits, each_norm, strict=True)
            ]
    return Factors(skip, factors, total)


def clip_value(group: dict[str, Any]) -> float:
    """The bound of a group's gradient elements; 0 for none. `clip_norm` overrides it."""
    return 0.0 if group["clip_norm"] else float(group["clip_value"])
