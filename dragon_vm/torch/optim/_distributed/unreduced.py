"""Sums of gradients that each process has its part of, in flat buffers that are reduced once."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Half precision gradients are summed in float32.
SUM_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class BufferKey(NamedTuple):
    """What the gradients of a buffer have in common."""

    group: Any
    device: torch.device
    dtype: torch.dtype


def by_buffer(params: Sequence[Tensor], groups: Mapping[int, Any]) -> dict[BufferKey, list[Tensor]]:
    """Arrange parameters by buffers, in an order that all processes share.

    `groups` are, by the parameters' ids, the process groups that replicate them.
    """
    found: dict[BufferKey, list[Tensor]] = {}
    for param in params:
        dtype = SUM_DTYPES.get(param.dtype, param.dtype)
        found.setdefault(BufferKey(groups[id(param)], param.device, dtype), []).append(param)
    return found


class UnreducedSums:
    """The sums of parameters that share a buffer.

    The buffer has room for all of them, for other processes may have gradients that this one lacks. One more
    element for each tells how many processes have one. Which of them have a gradient may change from call to call.
    """

    def __init__(self, key: BufferKey, params: list[Tensor]) -> None:
        self.key, self.params = key, params
        self._is_present = [False] * len(params)
        numels = [param.numel() for param in params]
        self._flat = torch.zeros(sum(numels) + len(params), dtype=key.dtype, device=key.device)
        *pieces, self._counts = self._flat.split([*numels, len(params)])
        # In the memory order of the parameters.
        strides = [torch.empty_like(param, device="meta").stride() for param in params]
        self._views = [
            piece.as_strided(param.shape, stride)
            for piece, param, stride in zip(pieces, params, strides, strict=True)
        ]

    def take(self, zeroed: Container[int] = ()) -> None:
        """Add the gradients that there are, and drop them; zero those of parameters with the ids `zeroed`."""
        grads = {index: param.grad for index, param in enumerate(self.params) if param.grad is not None}
        if not grads:
            return
        kept = [grads[index] for index in grads if id(self.params[index]) in zeroed]
        dropped = [self.params[index] for index in grads if id(self.params[index]) not in zeroed]
        # Where the addition fails, no gradient is lost.
        at_once(
            [
                partial(torch._foreach_add_, [self._views[index] for index in grads], list(grads.values())),
                partial(list, map(self._is_present.__setitem__, grads, repeat(True))),
                *(partial(grad.zero_) for grad in kept),
                set_grads(dropped, repeat(None)),
            ]
        )

    def reduced(self) -> dict[Tensor, Tensor]:
        """The mean over the processes, as DDP takes it, of each parameter that has a gradient on one of them."""
        are_whole = all(self._is_present)
        if are_whole:
            self._counts.fill_(1)
        else:
            self._counts.copy_(torch.tensor(self._is_present, device="cpu"))
        dist.all_reduce(self._flat, group=self.key.group)
        self._flat.div_(self.key.group.size())
        # Where this process has all gradients there is nothing to ask the device.
        present = self._is_present if are_whole else (self._counts != 0).tolist()
        return {
            param: view
            for param, view, is_there in zip(self.params, self._views, present, strict=True)
            if is_there
        }


def set_grads(params: Sequence[Tensor], grads: Iterable[Tensor | None]) -> partial[Any]:
    """A call that gives parameters these gradients."""
    return partial(list, map(setattr, params, repeat("grad"), grads))


def at_once(calls: Sequence[partial[Any]]) -> None:
    """Make calls one after the other without a bytecode between them: an interrupt comes before or after all."""
    list(map(partial.__call__, calls))
