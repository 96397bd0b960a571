"""What a prepared step rests on, compared before every use: nothing that can go stale is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._flatten import State
from dragon.vm.torch.optim._layout import guard_layouts
from dragon.vm.torch.optim._local import local
from dragon.vm.torch.optim._owner import Owner


class Premises:
    """Layouts, dtypes and devices of parameters and gradients, the state tensors, and the groups' structure.

    Args:
        optimizer: whose step it is.
        params: parameters with a gradient, or their shards.
        grads: their gradients, or their shards.
        states: their states, complete.
        fixed_grads: whether the step holds addresses of gradients.
    """

    def __init__(
        self,
        optimizer: Owner,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        fixed_grads: bool,
    ) -> None:
        self._guard = guard_layouts([*params, *grads])
        self._n_guarded = len(params) + len(grads)
        self._state = optimizer.state
        self._all_states = list(optimizer.state.values())
        self._states = states
        # Held, so that none of them can die and leave its address to another.
        self._entries = list(_entries(states))
        self._numbers: list[tuple[Any, ...]] = []
        self._structure = _structure(optimizer)
        self._fixed_grads = fixed_grads
        self._all_tensors = all(type(entry) is Tensor for entry in self._entries)
        self._addresses = self._read_addresses(params, grads)

    def _read_addresses(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[list[int]]:
        entries = self._entries if self._all_tensors else _shards(self._entries)
        addresses = [list(map(Tensor.data_ptr, params)), list(map(Tensor.data_ptr, entries))]
        if self._fixed_grads:
            addresses.append(list(map(Tensor.data_ptr, grads)))
        return addresses

    def hold(
        self, optimizer: Owner, params: Sequence[Tensor], grads: Sequence[Tensor], numbers: list[tuple[Any, ...]]
    ) -> bool:
        """Whether all is still as it was; the parameters are known to be the same objects.

        Args:
            optimizer: as before.
            params: as before, with shards for distributed parameters.
            grads: likewise; None among them is a difference.
            numbers: the groups' hyperparameters; equal ones spare a closer look.
        """
        return (
            len(params) + len(grads) == self._n_guarded
            and self._guard.check(*params, *grads)
            and optimizer.state is self._state
            and len(optimizer.state) == len(self._all_states)
            and all(map(is_, optimizer.state.values(), self._all_states))
            and self._has_structure(optimizer, numbers)
            and self._has_entries()
            and self._read_addresses(params, grads) == self._addresses
        )

    def _has_entries(self) -> bool:
        entries = list(_entries(self._states))
        return len(entries) == len(self._entries) and all(map(is_, entries, self._entries))

    def _has_structure(self, optimizer: Owner, numbers: list[tuple[Any, ...]]) -> bool:
        if _sizes(optimizer) != self._structure[0]:
            return False
        if numbers != self._numbers:
            if _structure(optimizer) != self._structure:
                return False
            self._numbers = numbers
        return True


def _entries(states: Sequence[State]) -> chain[Any]:
    return chain.from_iterable(map(dict.values, states))


def _shards(entries: Sequence[Any]) -> list[Tensor]:
    return [local(entry) for entry in entries if isinstance(entry, Tensor)]


def _sizes(optimizer: Owner) -> list[int]:
    return list(map(len, map(itemgetter("params"), optimizer.param_groups)))


def _structure(optimizer: Owner) -> tuple[list[int], list[Any]]:
    """Which parameters are in which group, and the options that decide what is compiled or kept."""
    return _sizes(optimizer), list(map(optimizer._structure, optimizer.param_groups))
