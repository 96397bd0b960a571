"""What a `GradScaler` is to find: it looks at the gradients that are there, and at no others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import local


@torch.no_grad()
def nonfinite(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether some gradients are infinite or NaN: fp32 [1] on a device, without waiting for it."""
    members: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.numel() and grad.layout == torch.strided:
            members.setdefault(grad.device, []).append(grad)
    found = torch.zeros(1, device=device)
    for chosen in members.values():
        norms = torch.stack(torch._foreach_norm(chosen, torch.inf))
        found += torch.isfinite(norms).all().logical_not().to(found)
    return found


@torch.no_grad()
def report(params: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Make an element of a gradient infinite if anything was found; no value is read.

    Args:
        params: whose gradients a scaler will check.
        found: each of one element, positive for infinite or NaN gradients elsewhere.

    Returns:
        Whether some gradient has an element for it.
    """
    grads = (local(param.grad) for param in params if param.grad is not None)
    grad = next((each for each in grads if each.numel() and each.layout == torch.strided), None)
    if grad is not None:
        element = grad[(0,) * grad.dim()]
        for each in found:
            flag = each.to(grad.device).reshape(()) > 0
            element.copy_(torch.where(flag, torch.full_like(element, torch.inf), element))
    return grad is not None


@torch.no_grad()
def stand_in(params: Sequence[Tensor]) -> Tensor | None:
    """Give the smallest parameter a gradient of zeros, if none has a gradient.

    Returns:
        The parameter; None if a gradient is there.
    """
    if any(param.grad is not None for param in params):
        return None
    # All processes choose the same one, by its whole shape.
    param = min((param for param in params if param.numel()), key=torch.Tensor.numel, default=None)
    if param is not None:
        param.grad = torch.zeros_like(param, requires_grad=False)
    return param
