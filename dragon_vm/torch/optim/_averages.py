"""Exchange parameters with their exponential moving averages for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl as without_torch_function
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from dragon.vm.torch.optim._distributed.hidden import split_by_fsdp1
from dragon.vm.torch.optim._distributed.owners import reshard
from dragon.vm.torch.optim._distributed.shards import is_distributed, local
from dragon.vm.torch.optim._groups.checks import check_state
from dragon.vm.torch.optim._groups.masters import MasterVersions


@contextmanager
def exchanged(
    state: Mapping[Any, Any], originals: dict[Tensor, Tensor], masters: MasterVersions
) -> Iterator[None]:
    """Give each parameter the value of its average, rounded to its dtype, inside a ``with`` block.

    Parameters without an "ema" in `state` stay as they are. Inside the block `originals` holds copies of the
    parameters' own values, of distributed ones their shards. To `masters` nobody has written then.
    """
    if originals:
        raise RuntimeError("swap_ema() was called inside swap_ema(): the parameters are exchanged already")
    with_masters = masters.settled(state)

    def restore() -> None:
        _restore(originals)
        masters.note_again(with_masters, state)

    try:
        try:
            _exchange(state, originals)
            yield
        finally:
            restore()
    finally:
        # Once more: an interrupt may have hit the line above.
        restore()


@_disable_dynamo
def _exchange(state: Mapping[Any, Any], originals: dict[Tensor, Tensor]) -> None:
    params = [p for p, entries in state.items() if isinstance(entries, Mapping) and "ema" in entries]
    if not params:
        raise RuntimeError("swap_ema() needs averages: give an ema_decay above 0, and take a step")
    if any(split_by_fsdp1(params)):
        raise RuntimeError(
            "swap_ema() cannot exchange parameters of FullyShardedDataParallel, which writes those that it "
            "gathered over them. Use FSDP2's fully_shard"
        )
    for param in params:
        check_state(param, state[param], ("ema",), counts_steps=False)
    averages = [local(state[param]["ema"]) for param in params]
    originals.update(without_torch_function(_copies, (), (params,), {}))
    without_torch_function(_write, (), (params, averages), {})


@_disable_dynamo
def _restore(originals: dict[Tensor, Tensor]) -> None:
    """Give each parameter its own value back, and forget the copies."""
    without_torch_function(_write, (), (list(originals), list(originals.values())), {})
    originals.clear()


@torch.no_grad()
def _copies(params: list[Tensor]) -> dict[Tensor, Tensor]:
    return {param: local(param).clone() for param in params}


@torch.no_grad()
def _write(params: list[Tensor], values: list[Tensor]) -> None:
    if not params:
        return
    torch._foreach_copy_(list(map(local, params)), values)
    distributed = list(filter(is_distributed, params))
    if distributed:
        increment_version(distributed)
        # FSDP2 may have gathered what was there before.
        reshard(distributed)
