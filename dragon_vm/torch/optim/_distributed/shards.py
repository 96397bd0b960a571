"""The local shards of distributed tensors: what this process updates of a `DTensor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

_local_of = attrgetter("_local_tensor")


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_distributed_type(kind: type) -> bool:
    """Whether tensors of a type are distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """The shards of tensors in this process; what is not distributed as it is."""
    try:
        return list(map(_local_of, tensors))
    except AttributeError:
        return list(map(local, tensors))


def local(tensor: Any) -> Any:
    """The shard of a `DTensor` that lives in this process; anything else as it is."""
    return tensor._local_tensor if is_distributed(tensor) else tensor


def distributed_like(param: Tensor, shard: Tensor) -> Tensor:
    """A shard as a `DTensor` with the global shape and placement of `param`, if that is one."""
    if not is_distributed(param):
        return shard
    like: Any = param
    module: Any = sys.modules["torch.distributed.tensor"]
    distributed: Tensor = module.DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return distributed


def placed_like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor distributed as `target` is, or a distributed one made whole for a target that is not.

    All processes of the mesh must come here together, each with the same whole tensor.
    """
    if is_distributed(target) == is_distributed(value):
        return value
    like: Any = target
    whole: Any = value
    if is_distributed(value):
        placed: Tensor = whole.full_tensor()
    else:
        module: Any = sys.modules["torch.distributed.tensor"]
        # Every process cuts its shard out of its own copy: nothing is sent.
        placed = module.distribute_tensor(
            whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return placed


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the shards of its distributed tensors; the very state if it has none."""
    return (
        {key: local(value) for key, value in state.items()} if any(map(is_distributed, state.values())) else state
    )


def everywhere(found_inf: Any) -> Tensor | None:
    """A finding of a `GradScaler` that holds for all processes; None for the 0 that stands for no gradient."""
    if not isinstance(found_inf, Tensor):
        return None
    whole: Any = found_inf
    return whole.full_tensor() if is_distributed(found_inf) else found_inf
