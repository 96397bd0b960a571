"""Guards: what a plan was made for, compared before each step by calls that PyTorch offers.

A guard holds no tensor, and no memory but that of step counters. Another tensor at the same address in the same
layout is as good as the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

Tensors = Sequence[Tensor]
States = Mapping[str, Tensors]

# 0 for a tensor without elements.
_data_ptr = Tensor.data_ptr
_shape_of = attrgetter("shape")

# What must be the same of each tensor.
_LAYOUT: tuple[Callable[[Tensor], object], ...] = (
    *(type, Tensor.stride, Tensor.is_conj, Tensor.is_neg),
    attrgetter("shape", "dtype", "device", "layout", "requires_grad"),
)


class Guard:
    """Compares the tensors of a step with those that a plan was made for: layouts, and addresses but of gradients.

    Gradients may lie elsewhere at each step, and states that `placed` does not name. Of step counters, each
    of which is one number, addresses alone are compared. With `takes_parts` some gradients may be absent.
    """

    def __init__(
        self, grads: Tensors, params: Tensors, states: States, placed: Sequence[str], *, takes_parts: bool
    ) -> None:
        self._placed = placed
        self._layouts = layout_guard([*grads, *params])
        self._laid_out = [key for key in states if key != "step"]
        laid_out = [states[key] for key in self._laid_out]
        self._state_layouts = layout_guard(list(chain(*laid_out)))
        self._are_complete = all(len(column) == len(params) for column in states.values())
        # Those of what belongs to each parameter, where some may have no gradient and have changed.
        owned = zip(grads, params, *(laid_out if self._are_complete else ()), strict=True) if takes_parts else ()
        self._part_layouts = list(map(layout_guard, owned))
        self._addresses = list(map(_data_ptr, self._fixed(params, states)))
        # Kept, so that no counter of another dtype comes to lie at the address of one that was taken away.
        self._counters = list(map(Tensor.untyped_storage, states.get("step", ())))
        self._shapes = list(map(_shape_of, params))

    def _fixed(self, params: Tensors, states: States) -> Iterable[Tensor]:
        return chain(params, *map(states.__getitem__, self._placed))

    def check(self, grads: Tensors, params: Tensors, states: States, present: bytes) -> bool:
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
        laid_out = list(map(states.__getitem__, self._laid_out))
        if is_whole:
            return self._layouts(*grads, *params) and self._state_layouts(*chain(*laid_out))
        columns = [params, *(laid_out if self._are_complete else ())]
        owned = zip(grads, *(compress(column, present) for column in columns), strict=True)
        if not all(check(*own) for check, own in zip(compress(self._part_layouts, present), owned, strict=True)):
            return False
        return self._are_complete or self._state_layouts(*chain(*laid_out))

    def holds(self, params: Tensors, states: States) -> bool:
        """Whether parameters and states, as many as then, are where they were, and fit each other as then."""
        addresses, shapes = list(map(_data_ptr, self._fixed(params, states))), list(map(_shape_of, params))
        are_there = addresses == self._addresses and shapes == self._shapes
        return are_there and self._state_layouts(*chain(*map(states.__getitem__, self._laid_out)))


def layout_guard(tensors: Tensors) -> Callable[..., bool]:
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


def _layouts(tensors: Tensors) -> list[list[object]]:
    return [list(map(read, tensors)) for read in _LAYOUT]
