"""Sharding that a tensor does not show: parameters that look whole, but of which others hold other parts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._distributed.owners import instances

_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


def hidden_sharding(params: Sequence[Tensor]) -> str | None:
    """Tell whether plain parameters are known to be parts of a model that other processes hold the rest of.

    It is asked while the optimizer is constructed: ZeroRedundancyOptimizer is found on the call stack. Sharding by
    hand, tensor parallelism with plain tensors and pipeline stages cannot be seen.

    Returns:
        The reason and the remedy, in the form of the end of an error text; None if nothing was found.
    """
    if any(split_by_fsdp1(params)):
        return (
            "FullyShardedDataParallel splits the parameters, and this process sees its own part alone: "
            "give process_group=model.process_group, or use clip_grad_norm_ of the model"
        )
    frame = _caller("torch.distributed.optim.zero_redundancy_optimizer", "_init_local_optimizer")
    if frame is not None and frame.f_locals["self"].process_group.size() > 1:
        return (
            "ZeroRedundancyOptimizer gives each process some of the parameters: "
            "give process_group by optimizer_class=functools.partial(AdamW, process_group=...), "
            "or use torch.nn.utils.clip_grad_norm_ before the step"
        )
    return None


def check_scaled_sums(params: Sequence[Tensor]) -> None:
    """Check that each process has whole sums of gradients for a `GradScaler`, where no `process_group` is given.

    Raises:
        RuntimeError: if FSDP1 splits parameters. A `ShardedGradScaler` agrees with other processes only where it
            unscales itself, and it leaves sums to the step.
    """
    if any(split_by_fsdp1(params)):
        raise RuntimeError(
            "a GradScaler checks sums of sum_grad() by this process's part alone, for FullyShardedDataParallel "
            "splits the parameters: give process_group=model.process_group, or leave sum_grad() out"
        )


def split_by_fsdp1(params: Sequence[Tensor]) -> list[bool | None]:
    """Tell for each parameter whether FSDP1 keeps other parts of it on other processes.

    With one process or NO_SHARD it does not. None stands for a parameter that FSDP1 does not manage.
    """
    flattened = [bool(getattr(param, "_fsdp_flattened", False)) for param in params]
    if not any(flattened):
        return [None] * len(params)
    sharded: dict[int, bool] = {}
    for handle in instances("torch.distributed.fsdp._flat_param", "FlatParamHandle"):
        flat = handle.flat_param
        for param in (flat, *(flat._params or ()), *(flat._shared_params or ())):
            sharded[id(param)] = handle.uses_sharded_strategy
    # A flattened parameter without a handle belongs to a model that is gone: it may well be a part.
    return [sharded.get(id(param), True) if flag else None for flag, param in zip(flattened, params, strict=True)]


def is_state_asked_for() -> bool:
    """Whether PyTorch's checkpoint functions call a step on this thread only to make it create states.

    They give zeros as gradients and as learning rates then.
    """
    return _caller(_CHECKPOINTS, "_init_optim_state") is not None


def is_loading() -> bool:
    """Whether PyTorch's checkpoint functions load a dict on this thread, maybe of the optimizer's own tensors."""
    return _caller(_CHECKPOINTS, "_load_optim_state_dict") is not None


class FlatDict(NamedTuple):
    """A flat dict that PyTorch's checkpoint functions load.

    Attributes:
        entries: its values, by names such as "state.0.weight.exp_avg".
        is_strict: whether each trained parameter must have a state.
    """

    entries: Mapping[str, Any]
    is_strict: bool


def loaded_flat_dict() -> FlatDict | None:
    """The flat dict that they load on this thread, but for models of FSDP1, whose states they convert."""
    frame = _caller(_CHECKPOINTS, "_load_optim_state_dict")
    entries, info = (frame.f_locals[name] for name in ("state_dict", "info")) if frame else ({}, None)
    if not entries or "state" in entries or info.fsdp_modules:
        return None
    return FlatDict(entries, info.strict)


class DictRequest(NamedTuple):
    """What PyTorch's checkpoint functions do with what `state_dict` returns to them on this thread.

    Attributes:
        is_theirs: whether they have called it.
        flattens: flatten it.
        fills: write a whole saved dict over it. They fail at a number that is saved in a group or a state and not
            there to be overwritten.
        broadcasts: write over it what rank 0 has. They give rank 0 alone what is not there to be overwritten.
    """

    is_theirs: bool
    flattens: bool
    fills: bool
    broadcasts: bool


def dict_request() -> DictRequest:
    """Tell what a state dict is for."""
    frame = _caller(_CHECKPOINTS, "_get_optim_state_dict")
    info = frame and frame.f_locals.get("info")
    flattens = bool(getattr(info, "flatten_optimizer_state_dict", False))
    fills = frame is not None and not flattens and is_loading()
    return DictRequest(frame is not None, flattens, fills, bool(getattr(info, "broadcast_from_rank0", False)))


def looking_scaler() -> Any:
    """The `GradScaler` whose step on this thread is about to look at gradients; None if there is none."""
    frame = _caller("torch.amp.grad_scaler", "step")
    return frame and frame.f_locals["self"]


def tell_scaler(found_inf: Tensor) -> bool:
    """Let the `GradScaler` whose step on this thread called the optimizer's find what it cannot see in gradients.

    Args:
        found_inf: fp32 [1], positive for infinite or NaN gradients elsewhere.

    Returns:
        Whether there is such a scaler.
    """
    frame = _caller("torch.amp.grad_scaler", "step")
    if frame is not None:
        frame.f_locals["optimizer_state"]["found_inf_per_device"][found_inf.device] = found_inf
    return frame is not None


def _caller(name: str, function: str) -> FrameType | None:
    """The frame of a function of an imported module on this thread's stack; None if it is not there."""
    # None for a module whose import somebody forbids.
    module = sys.modules.get(name)
    frame = sys._getframe() if module else None
    while frame and not (frame.f_code.co_name == function and frame.f_globals is vars(module)):
        frame = frame.f_back
    return frame
