"""The bound of narrow first moments, kept in a group whose betas change, and of those that are restored."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import host_number
from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._formats.bound import clamp_moment, moment_bound
from dragon.vm.torch.optim._modes import if_possible

# The betas of the last step, and behind them what they and all before allow, once they have changed.
_KEY = "bound_betas"

# What a saved bound is to be written over; by itself it is none.
_PLACE = (0.0, 0.0, 0.0)


def widen_bounds(
    groups: Iterable[dict[str, Any]], state: Mapping[Any, Any], sums: Container[Any] = frozenset()
) -> bool:
    """Note in groups what the betas so far allow their narrow moments; return whether any group changed.

    Betas from before the first gradient of a group made no moment: the bound begins anew with it. Until then it
    counts them, for parameters of the group on other processes may have moments, and one process saves for all.
    A group without `state` had no gradient yet; `sums` are parameters with a sum of gradients for the next step.
    """
    has_changed = False
    for group in groups:
        if not may_be_narrow(group):
            continue
        now = _readable(group.get("betas"))
        if now is None:
            continue
        before = group.get(_KEY)
        beta1, beta2, bound = (*(before or now), 0.0)[:3]
        if (beta1, beta2) != now:
            bound = max(bound, moment_bound(beta1, beta2, math.inf), moment_bound(*now, math.inf))
        if bound and _begins(group["params"], state, sums):
            bound = 0.0
        wanted = (*now, bound) if bound else now
        if before is None or tuple(before) != wanted:
            group[_KEY] = wanted
            has_changed = True
    return has_changed


def keep_bounds(groups: Iterable[dict[str, Any]], state: Mapping[Any, Any]) -> None:
    """Let groups keep the bound of the betas which their moments were made with, whatever is set now."""
    widen_bounds([group for group in groups if any(map(state.get, group["params"]))], state)


def bound_restored(restored: Mapping[str, Any], saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Bound a restored first moment whose second one was saved in a dtype of few exponents, as fp16.

    There it may have become 0, and an update would divide by epsilon alone.
    """
    second, betas = saved.get("exp_avg_sq"), _readable(group.get("betas"))
    if betas is None or not isinstance(second, Tensor) or not second.is_floating_point():
        return
    # Moments in 8 bits are bounded at each step.
    if not {"exp_avg", "exp_avg_sq"} <= restored.keys():
        return
    exp_avg, exp_avg_sq = local(restored["exp_avg"]), local(restored["exp_avg_sq"])
    if _least(second.dtype) <= _least(exp_avg_sq.dtype):
        return
    wide = torch.promote_types(exp_avg.dtype, torch.float32)
    bounded = clamp_moment(exp_avg.to(wide), exp_avg_sq.to(wide).sqrt(), moment_bound(*betas, math.inf))
    exp_avg.copy_(bounded)


def _least(dtype: torch.dtype) -> float:
    """The least normal number, which is that of fp32 in bf16."""
    return torch.finfo(dtype).smallest_normal


def may_be_narrow(group: Mapping[str, Any]) -> bool:
    """Whether an option of a group makes moments narrow: stochastic rounding does for bf16 parameters."""
    return group.get("state_dtype") is not None or bool(group.get("stochastic_rounding"))


def _readable(betas: Any) -> tuple[float, float] | None:
    """Betas as numbers; None for those on a device, and for those that the step refuses."""
    now = if_possible((IndexError, RuntimeError, TypeError, ValueError), _numbers, betas)
    return now if now and 0 <= min(now) <= max(now) < 1 else None


def _numbers(betas: Any) -> tuple[float, float] | None:
    return None if any(map(is_on_device, betas)) else (host_number(betas[0]), host_number(betas[1]))


def _begins(params: Sequence[Tensor], state: Mapping[Any, Any], sums: Container[Any]) -> bool:
    """Whether the next step makes the first moments of a group."""
    return not any(map(state.get, params)) and any(param.grad is not None or param in sums for param in params)


def add_place(packed_group: dict[str, Any]) -> None:
    """Give a group that is to be overwritten by a saved one a place for the bound that that one may have."""
    if "betas" in packed_group:
        packed_group[_KEY] = _PLACE


def drop_place(group: dict[str, Any]) -> None:
    """Take out of a loaded group the place if nothing was written to it."""
    # PyTorch makes lists of tuples on the way.
    if tuple(group.get(_KEY) or ()) == _PLACE:
        del group[_KEY]


def is_on_device(value: Any) -> bool:
    """Whether reading a number would wait for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"
