"""Norms and decisions of a step on which all processes that share the model agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.reduction import meeting_device
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.shared_norm import Reductions, SharedNorm, make_reductions
from dragon.vm.torch.optim._options import Settings, needs_norm
from dragon.vm.torch.optim._plan.recipe import Outcome

Group = dict[str, Any]


class Agreement:
    """The sums over processes of some parameters, made anew when the parameters change."""

    def __init__(self) -> None:
        # The parameters by id: process groups outlive them, tensors must not be kept.
        self._made_for: tuple[list[int], bool, Any] | None = None
        self._reductions: Reductions | None = None

    def find(
        self, params: Sequence[Tensor], groups: Sequence[Group], settings: Settings, *, decides: bool
    ) -> Reductions | None:
        """The sums that a step needs; None if it needs none, or no other process takes part.

        `params` are all of them, with a gradient or not. With `decides` a finding of some process decides for all.
        """
        clips_each = any(group["clip_norm"] for group in groups)
        if not (decides or clips_each or needs_norm(settings)):
            return None
        made_for = list(map(id, params)), clips_each, settings.process_group
        if self._made_for != made_for:
            self._reductions = make_reductions(params, settings.process_group, clips_each)
            self._made_for = made_for
        return self._reductions

    def take_part(
        self, params: Sequence[Tensor], groups: Sequence[Group], settings: Settings, scaling: Scaling
    ) -> Outcome:
        """Take part in the sums of a step for which this process has no gradient."""
        assert self._reductions is not None
        shared = SharedNorm(self._reductions, [], len(params))
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
