"""The bound of narrow first moments, kept in a group whose betas change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._formats import moment_bound

# The betas of the last step, and behind them what they and all before allow, once they have changed.
_KEY = "bound_betas"


def widen_bounds(groups: Iterable[dict[str, Any]]) -> bool:
    """Note in groups what the betas so far allow their narrow moments; return whether any group changed."""
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
            group[_KEY] = (*now, max(bound, moment_bound(beta1, beta2, math.inf), moment_bound(*now, math.inf)))
        elif before is None:
            group[_KEY] = now
        else:
            continue
        has_changed = True
    return has_changed


def is_on_device(value: Any) -> bool:
    """Whether reading a number would wait for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"
