"""Whether options fit the way in which parameters are distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._distributed.hidden import hidden_sharding, split_by_fsdp1
from dragon.vm.torch.optim._distributed.lanes import check_meshes
from dragon.vm.torch.optim._distributed.shards import is_distributed
from dragon.vm.torch.optim._formats.resolve import EIGHT_BIT
from dragon.vm.torch.optim._options import Settings


def check_sharding(groups: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """Check that norms are those of whole gradients, that no buffer takes memory, and that tensors have rows.

    Raises:
        TypeError, ValueError: naming the option, the reason and the remedy.
    """
    params: list[Tensor] = list(chain.from_iterable(group["params"] for group in groups))
    split = split_by_fsdp1(params)
    totals = {"max_grad_norm": settings.max_grad_norm, "skip_nonfinite": settings.skip_nonfinite}
    total = next((f"{name}={value}" for name, value in totals.items() if value), None)
    clip_norm = max((group.get("clip_norm", 0.0) for group in groups), default=0.0)
    each = f"clip_norm={clip_norm}" if clip_norm else None
    process_group = settings.process_group
    if total or each:
        check_meshes(params, process_group, per_tensor=bool(each))
    if process_group is None and (total or (each and any(split))):
        reason = hidden_sharding(params)
        if reason:
            raise ValueError(f"{total or each} needs whole gradients, but {reason}")
    if each and process_group is not None and process_group.size() > 1:
        # Nobody knows whether a plain parameter is a part.
        unknown = [p for p, known in zip(params, split, strict=True) if known is None and not is_distributed(p)]
        if unknown:
            raise ValueError(
                f"{each} with process_group needs DTensor or FSDP1 parameters, but got a plain one of shape "
                f"{tuple(unknown[0].shape)}: leave process_group out if each process has whole tensors"
            )
    if settings.flatten and (any(map(is_distributed, params)) or any(split)):
        raise ValueError(
            "flatten=True moves parameters, but these are distributed: their owner goes on gathering the "
            "memory that they were moved away from. Leave flatten=False"
        )
    for group in groups:
        asked = group.get("state_dtype")
        values = asked.values() if isinstance(asked, Mapping) else [asked]
        if EIGHT_BIT in values and any(split_by_fsdp1(group["params"])):
            raise ValueError(
                f"state_dtype={asked!r} is for tensors with rows, but FullyShardedDataParallel splits parameters "
                "into pieces without: nothing would get 8 bits. Use FSDP2's fully_shard, or "
                "state_dtype=torch.bfloat16"
            )
