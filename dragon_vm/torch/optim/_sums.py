"""Sums of gradients over several backward passes, kept in float32 or wider until a step uses them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._capture import is_capturing
from dragon.vm.torch.optim._flatten import FlattenedGroup, Signature
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._layout import in_layout_of, is_dense
from dragon.vm.torch.optim._local import local

if TYPE_CHECKING:
    from dragon.vm.torch.optim._triton import TritonSum

_HALF = (torch.float16, torch.bfloat16)


class GradientSums:
    """The sums of one optimizer by parameter; of a distributed parameter, those of its shard."""

    def __init__(self) -> None:
        self.totals: dict[Tensor, Tensor] = {}
        # Whether some were gathered outside of a capture.
        self.are_outside = False
        self._launches: dict[Signature, TritonSum] = {}
        # Those whose tables graphs read.
        self._captured: list[TritonSum] = []

    def __bool__(self) -> bool:
        return bool(self.totals)

    def __getstate__(self) -> dict[str, object]:
        return {"totals": self.totals, "are_outside": bool(self.totals), "_launches": {}, "_captured": []}

    def clear(self) -> None:
        """Start anew."""
        self.totals.clear()
        self.are_outside = False

    def take(self, params: Sequence[Tensor], launch: bool) -> None:
        """Add the gradients of the parameters to their sums and drop them.

        Args:
            params: all parameters; those without a gradient keep their sums.
            launch: add by a kernel, in one launch for each signature, rather than by torch operations.

        Raises:
            RuntimeError: within a capture, for a launch that is not prepared yet.
        """
        totals, grads = [], []
        taken: set[int] = set()
        self.are_outside |= not is_capturing()
        for param in params:
            grad = local(param.grad)
            if grad is None:
                continue
            if param not in self.totals:
                # A gradient that two parameters share can be the sum of one of them only.
                self.totals[param] = _own(local(param), grad.clone() if id(grad) in taken else grad)
                taken.add(id(grad))
            else:
                totals.append(self.totals[param])
                grads.append(grad)
            param.grad = None
        if not totals:
            return
        if launch:
            self._launch(totals, grads)
        else:
            torch._foreach_add_(totals, grads)

    def gradients(self, params: Sequence[Tensor], are_distributed: bool) -> Gradients:
        """What a step uses: gradients, or their shards and sums; None for those that are missing."""

        def read() -> list[Any]:
            grads: list[Any] = list(map(attrgetter("grad"), params))
            if self.totals:
                grads = self._with_sums(params, grads)
            return list(map(local, grads)) if are_distributed else grads

        return Gradients(read, are_own=not self.totals and not are_distributed)

    def _with_sums(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sum of each parameter, with its gradient if there is one too."""
        summed: list[Tensor | None] = []
        for param, grad in zip(params, grads, strict=True):
            total = self.totals.get(param)
            if total is not None and grad is not None:
                total = total + local(grad)
            summed.append(grad if total is None else total)
        return summed

    def _launch(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        from dragon.vm.torch.optim._triton import TritonSum

        members: dict[Signature, list[int]] = {}
        for index, (total, grad) in enumerate(zip(totals, grads, strict=True)):
            signature = Signature("triton", total.device, total.dtype, grad.dtype, total.dtype, (), False)
            members.setdefault(signature, []).append(index)
        for signature, indices in members.items():
            chosen = [totals[i] for i in indices]
            added = [in_layout_of(totals[i], grads[i]) for i in indices]
            launch = self._launches.get(signature)
            if is_capturing():
                if launch is None or not launch.fits(chosen):
                    raise RuntimeError(
                        "a first sum of these gradients cannot be captured: call sum_grad() as often outside"
                    )
                self._captured.append(launch)
            elif launch is None or not launch.fits(chosen):
                group = FlattenedGroup(signature, chosen, [{} for _ in chosen], [0] * len(chosen), indices)
                launch = self._launches[signature] = TritonSum(group)
            launch.add(chosen, added)


def _own(param: Tensor, grad: Tensor) -> Tensor:
    """A first gradient as a sum: itself where dtype, layout and ownership allow, for the parameter gives it up."""
    if grad.dtype in _HALF:
        return _laid_out(param, grad.float())
    laid_out = _laid_out(param, grad)
    return laid_out.clone() if laid_out is grad and _is_shared(grad) else laid_out


def _laid_out(param: Tensor, grad: Tensor) -> Tensor:
    return in_layout_of(param, grad) if grad.layout == torch.strided and is_dense(param) else grad


def _is_shared(grad: Tensor) -> bool:
    """Whether anybody else may write to the gradient's memory, as DDP does to its buckets."""
    if grad.layout != torch.strided:
        return True
    storage = grad.untyped_storage()
    # The gradient holds its storage once, and so does the object asked for here.
    return storage.nbytes() != grad.nbytes or torch._C._storage_Use_Count(storage._cdata) > 2
