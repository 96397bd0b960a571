"""The gradients of one step: as tensors where somebody needs tensors, as addresses where those will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain, islice

import torch
from torch import Tensor


class Gradients:
    """One gradient for each parameter of a step, or its shard or sum; None for those that are missing.

    Args:
        read: returns them; called once, if at all.
        are_own: whether they are the parameters' `.grad`, nothing else.
    """

    def __init__(self, read: Callable[[], list[Tensor]], *, are_own: bool = False) -> None:
        self._read, self.are_own = read, are_own

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Gradients:
        """These tensors."""
        return cls(lambda: tensors)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Themselves."""
        return self._read()

    @cached_property
    def addresses(self) -> Tensor:
        """Their addresses, int64 on the CPU; whoever has compared them leaves them here."""
        return addresses_of(self.tensors)


def addresses_of(tensors: Sequence[Tensor]) -> Tensor:
    """Addresses of tensors' memory, int64 [len(tensors)] on the CPU; 0 for those without elements."""
    return torch.tensor(list(map(Tensor.data_ptr, tensors)), dtype=torch.int64, device="cpu")


def apart(grads: list[Tensor]) -> list[Tensor]:
    """Gradients of which no two are the same memory, so that one may be written after it was read."""
    addresses = list(map(Tensor.data_ptr, grads))
    if len(set(addresses)) == len(grads):
        return grads
    first = {address: index for index, address in reversed(list(enumerate(addresses)))}
    return [
        grad if first[address] == index else grad.clone()
        for index, (address, grad) in enumerate(zip(addresses, grads, strict=True))
    ]


def all_apart(walked: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """`apart` of several lists together."""
    grads = iter(apart(list(chain.from_iterable(walked))))
    return [list(islice(grads, len(selected))) for selected in walked]
