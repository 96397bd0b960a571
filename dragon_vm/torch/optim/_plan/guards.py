"""Guards: what a plan was made for, compared before each step by calls that PyTorch offers.

A guard holds no tensor. Another tensor at the same address in the same layout is as good as the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

# 0 for a tensor without elements.
_data_ptr = Tensor.data_ptr

# Sets of gradients of one plan whose layouts are compared at the speed of C.
MOST_GUARDS = 8

# What must be the same of each tensor.
_LAYOUT: tuple[Callable[[Tensor], object], ...] = (
    *(type, Tensor.stride, Tensor.is_conj, Tensor.is_neg),
    attrgetter("shape", "dtype", "device", "layout", "requires_grad"),
)


class Guard:
    """Compares the tensors of a step with those that a plan was made for: layouts, and addresses but of gradients.

    Gradients may lie elsewhere at each step, and states that `placed` does not name. With `takes_parts`
    some gradients may be absent.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        placed: Sequence[str],
        *,
        takes_parts: bool = False,
    ) -> None:
        self._placed = placed
        self._layouts = layout_guard([*grads, *params])
        self._part_layouts = PartLayouts(grads, params) if takes_parts else None
        self._state_layouts = layout_guard(list(chain(*states.values())))
        self._addresses = list(map(_data_ptr, self._fixed(params, states)))

    def _fixed(self, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]) -> Iterable[Tensor]:
        return chain(params, *map(states.__getitem__, self._placed))

    def check(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        present: bytes,
    ) -> bool:
        """Whether all is as it was.

        `grads` are those that are there, as `present` tells for each parameter. There are as many parameters and
        states as then.
        """
        seen = self._addresses
        tensors = self._fixed(params, states)
        is_whole, n_columns = len(grads) == len(params), 1 + len(self._placed)
        if not is_whole and len(seen) == n_columns * len(params):
            # Nobody reads or writes what belongs to the others.
            tensors, seen = compress(tensors, present * n_columns), list(compress(seen, present * n_columns))
        if list(map(_data_ptr, tensors)) != seen:
            return False
        if is_whole:
            are_like = self._layouts(*grads, *params)
        else:
            are_like = self._part_layouts is not None and self._part_layouts.check(grads, params, present)
        return are_like and self._state_layouts(*chain(*states.values()))

    def holds(self, params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]) -> bool:
        """Whether parameters and states, as many as then, are where they were."""
        addresses = list(map(_data_ptr, self._fixed(params, states)))
        return addresses == self._addresses and self._state_layouts(*chain(*states.values()))


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


def _are_like(tensors: Sequence[Tensor], seen: Sequence[list[object]], present: bytes) -> bool:
    """Whether tensors, one for each that is not 0 in `present`, are laid out as all were seen."""
    return _layouts(tensors) == [list(compress(column, present)) for column in seen]


def _layouts(tensors: Sequence[Tensor]) -> list[list[object]]:
    return [list(map(read, tensors)) for read in _LAYOUT]
