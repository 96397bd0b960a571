"""Gradient accumulation: sums over several backward passes, in float32 or wider, until a step uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._graphs.capture import is_capturing
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup, Signature
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense

if TYPE_CHECKING:
    from dragon.vm.torch.optim._backends.triton import TritonDevice

_HALF = (torch.float16, torch.bfloat16)


class GradientSums:
    """The sums of one optimizer by parameter; of a distributed parameter, those of its shard."""

    def __init__(self) -> None:
        self.totals: dict[Tensor, Tensor] = {}
        # Whether some were gathered outside of a capture.
        self.are_outside = False
        self._launches: dict[Signature, _SumLaunch] = {}

    def __bool__(self) -> bool:
        return bool(self.totals)

    def __getstate__(self) -> dict[str, object]:
        return {"totals": self.totals, "are_outside": bool(self.totals), "_launches": {}}

    def clear(self) -> None:
        """Start anew."""
        self.totals.clear()
        self.are_outside = False

    def take(self, params: Sequence[Tensor], launch: bool) -> None:
        """Add the gradients of the parameters to their sums and drop them.

        Args:
            params: all parameters; those without a gradient keep their sums.
            launch: add by a kernel, in one launch for each signature, rather than by torch operations.
        """
        totals, grads = [], []
        self.are_outside |= not is_capturing()
        for param in params:
            grad = local(param.grad)
            if grad is None:
                continue
            if param not in self.totals:
                self.totals[param] = _as_sum(local(param), grad)
            else:
                totals.append(self.totals[param])
                grads.append(grad)
            param.grad = None
        if not totals:
            return
        if launch and not is_capturing():
            self._launch(totals, grads)
        else:
            torch._foreach_add_(totals, grads)

    def added_to(self, params: Sequence[Tensor], grads: Sequence[Any]) -> list[Any]:
        """For each parameter its sum, with its gradient if there is one too; None where both are missing."""
        summed = []
        for param, grad in zip(params, grads, strict=True):
            total = self.totals.get(param)
            if total is None:
                summed.append(grad)
            else:
                summed.append(total if grad is None else total + grad)
        return summed

    def _launch(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        members: dict[Signature, list[int]] = {}
        for index, (total, grad) in enumerate(zip(totals, grads, strict=True)):
            signature = Signature("triton", total.device, total.dtype, grad.dtype, (), (), None, False)
            members.setdefault(signature, []).append(index)
        for signature, indices in members.items():
            launch = self._launches.setdefault(signature, _SumLaunch(signature))
            chosen = [totals[i] for i in indices]
            launch.add(chosen, [in_layout_of(total, grads[i]) for total, i in zip(chosen, indices, strict=True)])


class _SumLaunch:
    """One launch that adds gradients to sums of one signature."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._numels: list[int] = []
        self._device: TritonDevice | None = None

    def add(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        """Add each gradient to its sum, which stands in the table as the parameter."""
        from dragon.vm.torch.optim._backends.context import DeviceContext
        from dragon.vm.torch.optim._backends.triton import TritonDevice

        group = FlattenedGroup(self._signature, [Entry(total, {}, 0, i) for i, total in enumerate(totals)])
        numels = [total.numel() for total in totals]
        if self._device is None or numels != self._numels:
            context = DeviceContext(self._signature.device)
            self._device = TritonDevice([group], "accumulate", context, 1, len(totals), False, counts=False)
            self._numels = numels
        self._device.accumulate(group, [grad.data_ptr() for grad in grads])


def _as_sum(param: Tensor, grad: Tensor) -> Tensor:
    """A first gradient as a sum: a copy, since others may hold the gradient, as DDP does its buckets."""
    dtype = torch.float32 if grad.dtype in _HALF else grad.dtype
    copy = grad.to(dtype, copy=True) if grad.layout == torch.strided else grad.clone()
    return in_layout_of(param, copy) if copy.layout == torch.strided and is_dense(param) else copy
