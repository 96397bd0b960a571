"""What a prepared step rests on, compared before every use: nothing that can go stale is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dragon.vm.torch.optim._flatten import State
from dragon.vm.torch.optim._layout import guard_layouts

if TYPE_CHECKING:
    from dragon.vm.torch.optim.optimizer import Optimizer


class Premises:
    """Layouts, dtypes and devices of parameters and gradients, the state tensors, and the groups' structure.

    Addresses are not among them: backends that need those compare them on their own.

    Args:
        optimizer: whose step it is.
        params: parameters with a gradient.
        grads: their gradients.
        states: their states, complete.
    """

    def __init__(
        self, optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
    ) -> None:
        self._guard = guard_layouts([*params, *grads])
        self._state = optimizer.state
        self._all_states = list(optimizer.state.values())
        self._states = states
        self._entries = list(_entries(states))
        self._structure = _structure(optimizer)

    def hold(self, optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether all is still as it was; the parameters are known to be the same objects."""
        return (
            self._guard.check(*params, *grads)
            and optimizer.state is self._state
            and _same_objects(list(optimizer.state.values()), self._all_states)
            and _same_objects(list(_entries(self._states)), self._entries)
            and _structure(optimizer) == self._structure
        )


def _entries(states: Sequence[State]) -> chain[Any]:
    return chain.from_iterable(map(dict.values, states))


def _same_objects(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))


def _structure(optimizer: Optimizer) -> list[Any]:
    """Which parameters are in which group, and the options that decide what is compiled or kept."""
    groups = optimizer.param_groups
    return [list(map(len, map(itemgetter("params"), groups))), list(map(optimizer._structure, groups))]
