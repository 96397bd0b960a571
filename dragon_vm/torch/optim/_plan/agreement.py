"""A step of a process without gradients, where other processes sum norms and decide with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.reduction import meeting_device
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.shared_norm import Reductions, SharedNorm
from dragon.vm.torch.optim._options import Settings, needs_norm
from dragon.vm.torch.optim._plan.recipe import Outcome

Group = dict[str, Any]


def take_part(
    reductions: Reductions, params: Sequence[Tensor], groups: Sequence[Group], settings: Settings, scaling: Scaling
) -> Outcome:
    """Take part in the sums of a step for which this process has no gradient."""
    shared = SharedNorm(reductions, [], len(params))
    device = meeting_device(params, settings.process_group)
    none = torch.zeros(0, dtype=torch.float64, device=device)
    if any(group["clip_norm"] for group in groups):
        _, flag = shared.each(none, scaling.found_inf, skip_nonfinite=settings.skip_nonfinite)
        return Outcome(None, (flag > 0).long().reshape(()))
    largest = settings.norm_type == math.inf
    total, flag = shared.total(none, scaling.found_inf, largest=largest)
    scale = 1.0 if scaling.grad_scale is None else scaling.grad_scale.double().to(device).reshape(())
    norm = (total if largest else total.sqrt()).reshape(()) / scale
    skipped = (flag > 0).reshape(()) | (torch.isfinite(norm).logical_not() & settings.skip_nonfinite)
    return Outcome(norm if needs_norm(settings) else None, skipped.long())
