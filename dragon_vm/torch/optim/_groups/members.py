"""The parameters of an optimizer, gathered anew at each step, and what this process updates of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import is_distributed_type, locals_of

_params_of = itemgetter("params")
_grad_of = attrgetter("grad")

# By type, whether tensors of it have memory of their own that kernels may write to.
_has_own_memory: dict[type, bool] = {}


class Members(NamedTuple):
    """All parameters of an optimizer.

    Attributes:
        params: parameters in the order of the groups.
        lengths: number of parameters of each group.
        shards: for each parameter the tensor that this process updates; the very list if none is distributed.
    """

    params: list[Tensor]
    lengths: list[int]
    shards: list[Tensor]

    def group_index(self) -> list[int]:
        """For each parameter, the index of its group."""
        return list(chain.from_iterable(map(repeat, range(len(self.lengths)), self.lengths)))

    def gradients(self) -> list[Any]:
        """For each parameter its gradient, or this process's shard of it; None where it is missing."""
        grads = list(map(_grad_of, self.params))
        return grads if self.shards is self.params else locals_of(grads)


def read_members(groups: Sequence[dict[str, Any]]) -> Members:
    """Gather the parameters from the groups; nothing is kept from earlier steps."""
    lists = list(map(_params_of, groups))
    params = list(chain.from_iterable(lists))
    are_distributed = any(map(is_distributed_type, set(map(type, params))))
    return Members(params, list(map(len, lists)), locals_of(params) if are_distributed else params)


def has_own_memory(kind: type) -> bool:
    """Whether tensors of a type have memory of their own: not wrappers that dispatch to inner tensors."""
    found = _has_own_memory.get(kind)
    if found is None:
        found = getattr(kind, "__torch_dispatch__", None) is Tensor.__torch_dispatch__
        _has_own_memory[kind] = found
    return found
