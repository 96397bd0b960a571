"""Guards: what a plan was made for, compared before each step by calls that PyTorch offers.

A guard holds no tensor. Another tensor at the same address in the same layout is as good as the old one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

# Sets of gradients of one plan whose layouts are compared at the speed of C.
MOST_GUARDS = 8

_data_ptr = Tensor.data_ptr
_LAYOUT: tuple[Callable[[Tensor], object], ...] = (
    *(type, Tensor.stride, Tensor.is_conj, Tensor.is_neg),
    attrgetter("shape", "dtype", "device", "layout"),
)


class LayoutGuard:
    """Compares the types, dtypes, devices, shapes and strides of tensors with those of others.

    Args:
        tensors: strided tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Sizes and strides that must be the same; None would stand for any.
        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        # PyTorch's check in C++ fails for any tensors under some dispatch modes: there public calls compare.
        self._check = guards.check if guards.check(*tensors) else _Layouts(tensors).check

    def check(self, *tensors: Tensor) -> bool:
        """Whether these tensors, as many as those of the guard, are laid out like them."""
        return bool(self._check(*tensors))


class _Layouts:
    """The same by public calls, several times slower."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = _layouts(tensors)

    def check(self, *tensors: Tensor) -> bool:
        return _layouts(tensors) == self._seen


class _SomeLayouts:
    """Compares the layouts of some of the tensors of a list with what they were."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._all = _layouts(tensors)
        # By which ones these are; a guard is made when the same ones come again.
        self._guards: dict[bytes, LayoutGuard | None] = {}

    def check(self, tensors: Sequence[Tensor], present: bytes) -> bool:
        """Whether these tensors, one for each that is not 0 in `present`, are laid out like the list's."""
        guard = self._guards.get(present)
        if guard is not None:
            return guard.check(*tensors)
        if _layouts(tensors) != [list(compress(column, present)) for column in self._all]:
            return False
        is_known = present in self._guards
        if len(self._guards) >= MOST_GUARDS:
            self._guards.clear()
        self._guards[present] = LayoutGuard(tensors) if is_known else None
        return True


def _layouts(tensors: Sequence[Tensor]) -> list[list[object]]:
    return [list(map(read, tensors)) for read in _LAYOUT]


class Guard:
    """Compares the tensors of a step with those that a plan was made for: layouts, and addresses but of gradients.

    The layouts of states are compared once their objects are others. Weak references tell whether an object has
    gone, whose identity another may have taken.

    Args:
        grads: gradients, which may lie elsewhere at each step.
        params: parameters.
        states: state tensors by name.
    """

    def __init__(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]
    ) -> None:
        self._params = LayoutGuard(params)
        self._grads = _SomeLayouts(grads)
        self._state_layouts = LayoutGuard(list(chain(*states.values())))
        # Column by column: parameters, then states of one name.
        self._addresses = list(map(addresses_of, (params, *states.values())))
        self._identify(states)

    def _identify(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        self._gone: list[weakref.ref[Tensor]] = []
        # The callback runs no Python code, in which an interrupt could be lost.
        self._references = [weakref.ref(tensor, self._gone.append) for tensor in chain(*states.values())]
        self._ids = list(map(id, chain(*states.values())))

    def check(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        present: bytes,
    ) -> list[int] | None:
        """The addresses of the gradients if all is as it was, else None.

        Args:
            grads: those of the gradients that are there.
            params: as many as then.
            states: as many as then.
            present: for each parameter whether its gradient is there.
        """
        addresses = addresses_of(grads)
        columns, seen = [params, *states.values()], self._addresses
        if len(grads) < len(params) and all(len(column) == len(params) for column in seen):
            # Nobody reads or writes what belongs to the others.
            columns = [list(compress(column, present)) for column in columns]
            seen = [list(compress(column, present)) for column in seen]
        if list(map(addresses_of, columns)) != seen:
            return None
        if not self._params.check(*params) or not self._grads.check(grads, present):
            return None
        if self._gone or list(map(id, chain(*states.values()))) != self._ids:
            if not self._state_layouts.check(*chain(*states.values())):
                return None
            self._identify(states)
        return addresses


def addresses_of(tensors: Iterable[Tensor]) -> list[int]:
    """Addresses of tensors' memory; 0 for those without elements."""
    return list(map(_data_ptr, tensors))
