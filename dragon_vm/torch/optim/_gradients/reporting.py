"""What a `GradScaler` is to find: it looks at the gradients that are there, and at no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.reduction import all_reduce_flags, meeting_device
from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.zeroing import writing


@torch.no_grad()
def nonfinite(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether some gradients are infinite or NaN: fp32 [1] on a device, without waiting for it."""
    members: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.numel() and grad.layout == torch.strided:
            members.setdefault(grad.device, []).append(grad)
    found = torch.zeros(1, dtype=torch.float32, device=device)
    for chosen in members.values():
        norms = torch.stack(torch._foreach_norm(chosen, torch.inf))
        found += torch.isfinite(norms).all().logical_not().to(found)
    return found


def report(params: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Make an element of a gradient infinite if anything was found, and tell whether there is one for it.

    No value is read. What was `found` elsewhere is positive for infinite or NaN gradients, of one element each.
    """
    grads = (local(param.grad) for param in params if param.grad is not None)
    grad = next((each for each in grads if _can_tell(each)), None)
    if grad is not None:
        with writing(grad.is_inference()):
            element = grad[(0,) * grad.dim()]
            for each in found:
                element.masked_fill_(each.to(grad.device).reshape(()) > 0, torch.inf)
    return grad is not None


def _can_tell(tensor: Tensor) -> bool:
    """Whether some element of a tensor, or of its gradient, can be infinite."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return bool(is_number and tensor.numel() and tensor.layout == torch.strided)


def stand_in(params: Sequence[Tensor]) -> Tensor | None:
    """Give the smallest parameter a gradient of zeros, if none has a gradient.

    Returns:
        The parameter; None if a gradient is there.
    """
    if any(param.grad is not None for param in params):
        return None
    # All processes choose the same one, by its whole shape; one that trains if there is one.
    usable = [param for param in params if _can_tell(param)]
    trained = [param for param in usable if param.requires_grad]
    param = min(trained or usable, key=torch.Tensor.numel, default=None)
    if param is not None:
        param.grad = torch.zeros_like(param, requires_grad=False)
    return param


def report_to_all(params: Sequence[Tensor], process_group: Any) -> tuple[Tensor | None, Tensor | None]:
    """Report infinite and NaN gradients to all processes of a group, so that their scalers do the same.

    All processes of the group call this, each with its own parameters.

    Returns:
        The parameter that got a gradient of zeros, for others have gradients and this process has none. The
        finding, fp32 [1], where no gradient of this process has an element that could tell it to its scaler.
    """
    grads = [local(param.grad) for param in params if param.grad is not None]
    device = meeting_device(params, process_group)
    found = nonfinite(grads, device)
    flags = torch.cat([found, torch.full_like(found, float(bool(grads)))])
    all_reduce_flags(flags, process_group)
    if not grads and not float(flags[1]):
        return None, None
    param = stand_in(params)
    return param, None if report(params, [flags[:1]]) else flags[:1]


def any_of(flags: Sequence[bool], params: Sequence[Tensor], process_group: Any) -> list[bool]:
    """For each flag whether some process of a group has set it. It waits for the device."""
    values = torch.tensor(flags, dtype=torch.float32, device=meeting_device(params, process_group))
    all_reduce_flags(values, process_group)
    return [value > 0 for value in values.tolist()]


class ScalerReport:
    """What buckets found in gradients that are gone, for a `GradScaler` that checks those that are left.

    The scaler is None for a loss that is not scaled.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler = scaler
        self._found_inf: list[Tensor] = []

    def begin(self) -> None:
        """Start a backward pass."""
        self._found_inf.clear()

    def found_inf(self, grads: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
        """Positive if some gradient is infinite or NaN, fp32 [1] on a device; None if no scaler asks."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return nonfinite([grad for grad in grads if grad is not None], device)

    def scaling(self, found_inf: Tensor | None) -> Scaling:
        """The scale of gradients beside what all processes found of them, which is noted."""
        if self.scaler is None or found_inf is None:
            return Scaling()
        self._found_inf.append(found_inf)
        return Scaling(self.scaler.scale(torch.ones_like(found_inf)), found_inf)

    def tell(self, kept: Sequence[Tensor]) -> None:
        """Make a gradient that is left infinite if one that is gone was: of the parameters `kept`."""
        if self._found_inf and report(kept, self._found_inf):
            self._found_inf.clear()

    def untold(self) -> list[Tensor]:
        """What was found and not told: no gradient was left."""
        found, self._found_inf = self._found_inf, []
        return found
