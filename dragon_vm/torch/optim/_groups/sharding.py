"""Whether options fit the way in which parameters are distributed: asked at construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._distributed.hidden import check_norms, split_by_fsdp1
from dragon.vm.torch.optim._distributed.shards import is_distributed
from dragon.vm.torch.optim._formats.resolve import EIGHT_BIT
from dragon.vm.torch.optim._options import Settings


def check_sharding(groups: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """Check that norms are those of whole gradients, that no buffer takes memory, and that tensors have rows.

    Raises:
        TypeError, ValueError: naming the option, the reason and the remedy.
    """
    params: list[Tensor] = list(chain.from_iterable(group["params"] for group in groups))
    totals = {"max_grad_norm": settings.max_grad_norm, "skip_nonfinite": settings.skip_nonfinite}
    each = max((group.get("clip_norm", 0.0) for group in groups), default=0.0)
    check_norms(
        params,
        settings.process_group,
        total=next((f"{name}={value}" for name, value in totals.items() if value), None),
        per_tensor=f"clip_norm={each}" if each else None,
    )
    if settings.flatten and (any(map(is_distributed, params)) or any(split_by_fsdp1(params))):
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
