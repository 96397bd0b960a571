"""The layouts of tensors, compared with what they were: types, dtypes, devices, shapes, strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

# Sets of gradients of one plan whose layouts are compared at the speed of C.
MOST_GUARDS = 8

_LAYOUT: tuple[Callable[[Tensor], object], ...] = (
    *(type, Tensor.stride, Tensor.is_conj, Tensor.is_neg),
    attrgetter("shape", "dtype", "device", "layout", "requires_grad"),
)


def layout_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells whether tensors, as many as these strided ones, are laid out like them."""
    # Sizes and strides that must be the same; None would stand for any.
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    if guards.check(*tensors):
        check: Callable[..., bool] = guards.check
        return check
    # PyTorch's check in C++ fails for any tensors under some dispatch modes: there public calls compare.
    seen = _layouts(tensors)
    return lambda *now: _layouts(now) == seen


class PartLayouts:
    """Compares the layouts of some gradients and of their parameters with what they were."""

    def __init__(self, grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._grads, self._params = _layouts(grads), _layouts(params)
        self._all_params = layout_guard(params)
        # By which ones take part; a guard is made when the same ones come again.
        self._guards: dict[bytes, Callable[..., bool] | None] = {}

    def check(self, grads: Sequence[Tensor], params: Sequence[Tensor], present: bytes) -> bool:
        """Whether all is laid out as it was.

        `grads` are those that are there, as `present` tells for each parameter. Other parameters may have changed.
        """
        guard = self._guards.get(present)
        if guard is not None:
            return guard(*grads, *compress(params, present))
        if not _are_like(grads, self._grads, present):
            return False
        if not self._all_params(*params) and not _are_like(list(compress(params, present)), self._params, present):
            return False
        is_known = present in self._guards
        if len(self._guards) >= MOST_GUARDS:
            self._guards.clear()
        self._guards[present] = layout_guard([*grads, *compress(params, present)]) if is_known else None
        return True


def _are_like(tensors: Sequence[Tensor], seen: Sequence[list[object]], present: bytes) -> bool:
    """Whether tensors, one for each that is not 0 in `present`, are laid out as all were seen."""
    return _layouts(tensors) == [list(compress(column, present)) for column in seen]


def _layouts(tensors: Sequence[Tensor]) -> list[list[object]]:
    return [list(map(read, tensors)) for read in _LAYOUT]
