"""What a prepared step rests on, compared before every use: nothing that can go stale is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._containers import ContainerWatch
from dragon.vm.torch.optim._flatten import State
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._identity import same_tensors
from dragon.vm.torch.optim._local import is_distributed, local
from dragon.vm.torch.optim._owner import Owner
from dragon.vm.torch.optim._watch import watch, watch_grads


class Premises:
    """Parameters, gradients and state tensors, their addresses and layouts, and the groups' structure.

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
        grads: Gradients,
        states: Sequence[State],
        *,
        fixed_grads: bool,
    ) -> None:
        self._state = optimizer.state
        of_all = [state for state in optimizer.state.values() if isinstance(state, dict)]
        self._all_states = ContainerWatch([optimizer.state, *of_all], [])
        self._states = states
        entries = [entry for state in states for entry in state.values() if _is_strided(entry)]
        self._has_shards = any(map(is_distributed, entries))
        self._shards = _shards(states) if self._has_shards else []
        self._watch = watch(params, list(map(local, entries)))
        self._grad_watch = watch_grads(self._watch, grads)
        self._fixed = grads.addresses if fixed_grads else None
        self._numbers: list[tuple[Any, ...]] = []
        self._structure = _structure(optimizer)

    def hold(self, optimizer: Owner, grads: Gradients, numbers: list[tuple[Any, ...]]) -> bool:
        """Whether all is still as it was; parameters, or shards, and groups are known to be the same objects.

        Args:
            optimizer: as before.
            grads: gradients as before; None among them is a difference. Their addresses are left there.
            numbers: the groups' hyperparameters; equal ones spare a closer look.
        """
        return (
            optimizer.state is self._state
            and self._all_states.is_unchanged()
            and self._has_structure(optimizer, numbers)
            and (not self._has_shards or same_tensors(_shards(self._states), self._shards))
            and self._watch.is_unchanged()
            and self._grad_watch.find(grads)
            and (self._fixed is None or torch.equal(grads.addresses, self._fixed))
        )

    def _has_structure(self, optimizer: Owner, numbers: list[tuple[Any, ...]]) -> bool:
        if numbers != self._numbers:
            if _structure(optimizer) != self._structure:
                return False
            self._numbers = numbers
        return True


def _is_strided(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.layout == torch.strided


def _shards(states: Sequence[State]) -> list[Any]:
    return list(map(local, chain.from_iterable(map(dict.values, states))))


def _structure(optimizer: Owner) -> list[Any]:
    """The options of all groups that decide what is compiled or kept."""
    return list(map(optimizer._structure, optimizer.param_groups))
