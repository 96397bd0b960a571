"""Gradients that stay behind a step without a `GradScaler`'s scale, as PyTorch's fused operations leave them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.zeroing import apart, writing


def unscale_all(grads: Sequence[Tensor], scale: float | Tensor) -> None:
    """Divide gradients in place, of which no two are the same memory, by a number or a tensor of one element."""
    divisor = scale.reshape(()) if isinstance(scale, Tensor) else scale
    for is_inference in (False, True):
        if chosen := [grad for grad in grads if grad.is_inference() == is_inference]:
            with writing(is_inference):
                _divide(chosen, divisor)


def _divide(grads: Sequence[Tensor], divisor: float | Tensor) -> None:
    parts = [each_once(grad, grad) for grad in grads]
    parts = [as_real(part.conj() if part.is_conj() else part) for part in parts]
    if in_place := [part for part in parts if _is_divided_once(part)]:
        torch._foreach_div_(in_place, divisor)
    for part in parts:
        if not _is_divided_once(part):
            wide = part if part.dtype == torch.float64 else part.float()
            part.copy_(wide / divisor)


def _is_divided_once(tensor: Tensor) -> bool:
    """Whether an operation on lists divides a tensor in place by any number and rounds once.

    It takes no negated views, and in half precision on a GPU it rounds twice.
    """
    return not tensor.is_neg() and (tensor.is_cpu or tensor.dtype in (torch.float32, torch.float64))


def unscale_left(params: Iterable[Tensor], scaling: Scaling) -> None:
    """Divide the gradients of parameters by the scale, unless the step was skipped; no value is read."""
    assert scaling.grad_scale is not None
    members: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = local(param.grad)
            members.setdefault(grad.device, []).append(grad)
    for device, grads in members.items():
        scale = scaling.grad_scale.to(device)
        if scaling.found_inf is not None:
            found = scaling.found_inf.to(device).reshape(()) > 0
            scale = torch.where(found, torch.ones_like(scale), scale)
        unscale_all(apart(grads, range(len(grads))), scale)


def assign(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of their shape, which may be an expanded one."""
    with writing(tensor.is_inference()):
        each_once(tensor, tensor).copy_(each_once(values, tensor))


def each_once(tensor: Tensor, expanded: Tensor) -> Tensor:
    """A tensor without what stands for repetitions in one of its shape that may be expanded."""
    if expanded.layout != torch.strided:
        return tensor
    for dim, (size, stride) in enumerate(zip(expanded.shape, expanded.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
