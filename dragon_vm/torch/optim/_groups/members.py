"""The parameters of an optimizer, gathered anew at each step, and what this process updates of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._distributed.placement import GradientPlacements
from dragon.vm.torch.optim._distributed.shards import locals_of

_params_of = itemgetter("params")
_grad_of = attrgetter("grad")


class Members(NamedTuple):
    """All parameters of an optimizer, and their gradients.

    Attributes:
        params: parameters in the order of the groups.
        lengths: number of parameters of each group.
        shards: for each parameter the tensor that this process updates; the very list if none is distributed.
        grads: for each its gradient, or this process's shard of it, ready for use; None where it is missing.
        are_distributed: whether some parameter is distributed.
        are_copies: whether some gradients of distributed parameters may be copies, which lie as the parameters do.
    """

    params: list[Tensor]
    lengths: list[int]
    shards: list[Tensor]
    grads: list[Any]
    are_distributed: bool
    are_copies: bool = False

    @property
    def have_grads(self) -> bool:
        """Whether some parameter has a gradient."""
        return any(grad is not None for grad in self.grads)

    def group_index(self) -> list[int]:
        """For each parameter, the index of its group."""
        return list(chain.from_iterable(map(repeat, range(len(self.lengths)), self.lengths)))


class MemberReader:
    """Reads the members of an optimizer from its groups. It keeps the types of parameters, and no parameter."""

    def __init__(self) -> None:
        self._types: list[type] = []
        self._placements = GradientPlacements([])

    def read(self, groups: Sequence[dict[str, Any]]) -> Members:
        """Gather parameters and gradients.

        Raises:
            ValueError: for a gradient that is distributed otherwise than its parameter can be.
        """
        lists = list(map(_params_of, groups))
        params = list(chain.from_iterable(lists))
        types = list(map(type, params))
        if types != self._types:
            self._types, self._placements = types, GradientPlacements(params)
        grads: Any = self._placements.shards(params, list(map(_grad_of, params)))
        are_distributed, are_copies = self._placements.are_distributed, self._placements.are_copies
        shards = locals_of(params) if are_distributed else params
        return Members(params, list(map(len, lists)), shards, grads, are_distributed, are_copies)
