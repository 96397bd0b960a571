"""The bound of narrow first moments, kept in a group whose betas change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._formats.bound import moment_bound

# The betas of the last step, and behind them what they and all before allow, once they have changed.
_KEY = "bound_betas"

# What a saved bound is to be written over; by itself it is none.
_PLACE = (0.0, 0.0, 0.0)


def widen_bounds(groups: Iterable[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
    """Note in groups what the betas so far allow their narrow moments; return whether any group changed.

    Betas that changed before a group had a state, in the optimizer's `state`, made no moment.
    """
    has_changed = False
    for group in groups:
        if group.get("state_dtype") is None:
            continue
        betas = group.get("betas", ())
        if not betas or any(map(is_on_device, betas)):
            continue
        now = float(betas[0]), float(betas[1])
        if not 0 <= min(now) <= max(now) < 1:
            continue  # the step refuses them
        before = group.get(_KEY)
        beta1, beta2, bound = (*(before or now), 0.0)[:3]
        if (beta1, beta2) != now:
            bound = max(bound, moment_bound(beta1, beta2, math.inf), moment_bound(*now, math.inf))
            group[_KEY] = (*now, bound) if any(map(state.get, group["params"])) else now
        elif before is None:
            group[_KEY] = now
        else:
            continue
        has_changed = True
    return has_changed


def add_places(packed_groups: Iterable[dict[str, Any]]) -> None:
    """Give groups that are to be overwritten by saved ones a place for the bound that those may have."""
    for group in packed_groups:
        if "betas" in group:
            group[_KEY] = _PLACE


def drop_places(groups: Iterable[dict[str, Any]]) -> None:
    """Take out of loaded groups the places that nothing was written to."""
    for group in groups:
        # PyTorch makes lists of tuples on the way.
        if tuple(group.get(_KEY) or ()) == _PLACE:
            del group[_KEY]


def is_on_device(value: Any) -> bool:
    """Whether reading a number would wait for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"
