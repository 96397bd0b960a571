"""What it is to watch tensors, and how public calls do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from dragon.vm.torch.optim._gradients import Gradients, addresses_of


class Watch(Protocol):
    """Remembers shape, strides, dtype, address and lazy bits (conjugation, negation) of tensors."""

    def is_unchanged(self) -> bool:
        """Whether all are as they were."""


class GradWatch(Protocol):
    """Remembers shape, strides, dtype and lazy bits of gradients, by public calls their type and device too."""

    def find(self, grads: Gradients) -> bool:
        """Whether these gradients are laid out as the remembered ones were; leaves their addresses there."""


_READERS: tuple[Callable[[Tensor], object], ...] = (
    *(Tensor.data_ptr, Tensor.stride, Tensor.is_conj, Tensor.is_neg),
    attrgetter("shape", "dtype"),
)


class PlainWatch:
    """A `Watch` of public calls only, several times slower than one that reads headers."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._seen = self._look()

    def _look(self) -> list[list[object]]:
        return [list(map(read, self._tensors)) for read in _READERS]

    def is_unchanged(self) -> bool:
        """Whether all are as they were."""
        return self._look() == self._seen


class PlainGradWatch:
    """A `GradWatch` of public calls only."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._seen = list(map(layout, grads))

    def find(self, grads: Gradients) -> bool:
        """Whether these gradients are laid out as the remembered ones were; leaves their addresses there."""
        if list(map(layout, grads.tensors)) != self._seen:
            return False
        grads.addresses = addresses_of(grads.tensors)
        return True


def layout(tensor: Tensor | None) -> tuple[object, ...] | None:
    """How a tensor is laid out; None for what is no strided tensor."""
    if tensor is None or tensor.layout != torch.strided:
        return None
    lazy = tensor.is_conj(), tensor.is_neg()
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), lazy
