"""Gradients that are set to zero or cut from their graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.tensor_type import Tensor as DragonTensor


def detach_all(grads: Sequence[Tensor]) -> None:
    """Detach gradients from any graph, in place, as PyTorch's `zero_grad` does."""
    if not any(map(attrgetter("requires_grad"), grads)):
        return
    for grad in grads:
        if grad.grad_fn is not None:
            grad.detach_()
        else:
            grad.requires_grad_(False)


def writing(is_inference: bool) -> AbstractContextManager[None]:
    """A mode in which tensors may be written: that which made them, if it is inference mode."""
    return torch.inference_mode() if is_inference else torch.no_grad()


def zero_all(grads: Sequence[Tensor]) -> None:
    """Set gradients to zero, all strided ones in one operation, and detach them from any graph."""
    detach_all(grads)
    strided = []
    for grad in grads:
        if grad.is_inference():
            with writing(is_inference=True):
                grad.zero_()
        elif grad.layout == torch.strided and not grad.is_conj() and not grad.is_neg():
            strided.append(grad)
        else:
            grad.zero_()
    if strided:
        torch._foreach_zero_(strided)


def is_dragon(param: Tensor) -> bool:
    """Whether a parameter is one of Dragon's own; `isinstance` says so of every tensor."""
    return DragonTensor in type(param).__mro__


def are_dragon(params: Sequence[Tensor]) -> bool:
    """Whether there are parameters, and all of them Dragon's own."""
    return bool(params) and all(map(is_dragon, params))


def zero_or_remove(params: Iterable[Tensor], set_to_none: bool | None) -> None:
    """Set the gradients of parameters to zero, or with `set_to_none` remove them.

    None decides by each parameter: gradients of Dragon's own are zeroed.
    """
    zeroed = []
    for param in params:
        if param.grad is None:
            continue
        if set_to_none or (set_to_none is None and not is_dragon(param)):
            param.grad = None
        else:
            zeroed.append(local(param.grad))
    zero_all(zeroed)


def apart(grads: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
    """Gradients of which no two at these positions start at the same memory; the very sequence if that holds.

    So one may be written after it was read. Empty ones and those without memory of their own have address 0.
    """
    addresses = list(map(Tensor.data_ptr, map(grads.__getitem__, positions)))
    if len(set(addresses)) == len(addresses):
        return grads
    seen: set[int] = set()
    grads = list(grads)
    # The longest one stays: what is written to it reaches the others.
    for position, address in sorted(zip(positions, addresses, strict=True), key=lambda at: -grads[at[0]].nbytes):
        if address and address in seen:
            grads[position] = grads[position].clone()
        seen.add(address)
    return grads
