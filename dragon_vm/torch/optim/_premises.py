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
        fixed_params: whether the step holds addresses of parameters and states.
        fixed_grads: whether the step holds addresses of gradients.
    """

    def __init__(
        self,
        optimizer: Owner,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        fixed_params: bool,
        fixed_grads: bool,
    ) -> None:
        self._guard = guard_layouts([*params, *grads])
        self._state = optimizer.state
        self._all_states = list(optimizer.state.values())
        self._states = states
        # Held, so that none of them can die and leave its address to another.
        self._entries = list(_entries(states))
        self._structure = _structure(optimizer)
        self._fixed_params, self._fixed_grads = fixed_params, fixed_grads
        self._tensors = [local(entry) for entry in self._entries if isinstance(entry, Tensor)]
        self._addresses = self._read_addresses(params, grads)

    def _read_addresses(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[list[int]]:
        addresses = []
        if self._fixed_params:
            addresses = [list(map(Tensor.data_ptr, params)), list(map(Tensor.data_ptr, self._tensors))]
        if self._fixed_grads:
            addresses.append(list(map(Tensor.data_ptr, grads)))
        return addresses

    def hold(self, optimizer: Owner, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether all is still as it was; the parameters are known to be the same objects."""
        return (
            self._guard.check(*params, *grads)
            and optimizer.state is self._state
            and _same_objects(list(optimizer.state.values()), self._all_states)
            and _same_objects(list(_entries(self._states)), self._entries)
            and _structure(optimizer) == self._structure
            and self._read_addresses(params, grads) == self._addresses
        )


def _entries(states: Sequence[State]) -> chain[Any]:
    return chain.from_iterable(map(dict.values, states))


def _same_objects(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))


def _structure(optimizer: Owner) -> list[Any]:
    """Which parameters are in which group, and the options that decide what is compiled or kept."""
    groups = optimizer.param_groups
    return [list(map(len, map(itemgetter("params"), groups))), list(map(optimizer._structure, groups))]
