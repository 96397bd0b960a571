"""The local shards of distributed tensors: the part of a `DTensor` that this process updates."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

from torch import Tensor

# An attribute in a slot: `map` reads it without a Python call for each tensor.
_LOCAL = attrgetter("_local_tensor")


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is a `DTensor`, without importing the module that defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_distributed_type(kind: type) -> bool:
    """Whether tensors of a type are distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def is_pending(tensor: object) -> bool:
    """Whether a tensor is the result of a collective that may still run."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    return module is not None and isinstance(tensor, module.AsyncCollectiveTensor)


def ready(tensor: Any) -> Any:
    """The result of a collective, waited for in stream order; anything else as it is."""
    return tensor.trigger_wait() if is_pending(tensor) else tensor


def local(tensor: Any) -> Any:
    """The shard of a `DTensor` in this process, ready for use; anything else as it is.

    A tensor that a collective still fills is waited for. On an accelerator the stream waits, not the host.
    """
    return ready(tensor._local_tensor if is_distributed(tensor) else tensor)


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """The shards of tensors that are ready; plain tensors and None as they are."""
    are_distributed = set(map(is_distributed_type, set(map(type, tensors))))
    if are_distributed == {True}:
        return list(map(_LOCAL, tensors))
    if True not in are_distributed:
        return list(tensors)
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the shards of its distributed tensors; the very state if it has none."""
    if not any(map(is_distributed, state.values())):
        return state
    return {key: local(value) for key, value in state.items()}


def distributed_like(param: Any, shard: Tensor) -> Tensor:
    """A tensor for this process's part of `param`, as a `DTensor` if `param` is one.

    Args:
        param: gives global shape, global strides, mesh and placements.
        shard: of the shape of the parameter's shard, of any dtype. The result shares its memory.

    Raises:
        ValueError: for a shard of another shape, or one that does not begin with its storage. PyTorch saves and
            copies a `DTensor` as if its storage offset held for the global tensor.
    """
    if not is_distributed(param):
        return shard
    if shard.shape != param._local_tensor.shape:
        raise ValueError(
            f"a shard must have shape {tuple(param._local_tensor.shape)}, but got {tuple(shard.shape)}"
        )
    if shard.storage_offset():
        raise ValueError(f"a shard must have storage offset 0, but got {shard.storage_offset()}")
    spec = param._spec
    if spec.tensor_meta.dtype != shard.dtype:
        spec = copy.copy(spec)
        spec.tensor_meta = spec.tensor_meta._replace(dtype=shard.dtype)
    # `DTensor.from_local` would move the shard of an offloaded parameter to the device of its mesh.
    module: Any = sys.modules["torch.distributed.tensor"]
    distributed: Tensor = module.DTensor(shard, spec, requires_grad=False)
    return distributed


class Shards:
    """Reads the shards of tensors that are distributed where certain parameters are.

    Each call is one pass in C over the tensors: no Python call for a tensor, and no pass at all over plain ones.

    Args:
        params: the parameters, in the order in which their gradients and states come later. None of them is kept.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._mask = bytes(map(is_distributed, params))
        self._plain_mask = bytes(not flag for flag in self._mask)
        self._positions = tuple(compress(range(len(params)), self._mask))
        self._are_all = len(self._positions) == len(params)

    def __bool__(self) -> bool:
        """Whether any parameter is distributed."""
        return bool(self._positions)

    def distributed(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The tensors at the positions of distributed parameters."""
        return tensors if self._are_all else list(compress(tensors, self._mask))

    def plain(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The tensors at the positions of plain parameters."""
        return list(compress(tensors, self._plain_mask)) if self._positions else tensors

    def of(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The shards of tensors, one for each parameter; the very sequence if no parameter is distributed.

        Args:
            tensors: parameters or states, distributed where the parameters are. Gradients are read by
                `GradientPlacements`.

        Raises:
            AttributeError: for a plain tensor of a distributed parameter.
        """
        if not self._positions:
            return tensors
        if self._are_all:
            return list(map(_LOCAL, tensors))
        shards = list(tensors)
        for position, shard in zip(self._positions, map(_LOCAL, self.distributed(tensors)), strict=True):
            shards[position] = shard
        return shards
