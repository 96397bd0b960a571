"""Norms of gradients over all processes that share a model, in stream order: nothing here waits for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.lanes import make_lanes
from dragon.vm.torch.optim._distributed.reduction import Reduction, TensorReduction, meeting_device


class Reductions(NamedTuple):
    """The sums over processes of one optimizer.

    Attributes:
        total: of all gradients together.
        each: of each gradient alone; None if no group clips them so.
        device: where processes meet that have no gradient, or some of several devices.
    """

    total: Reduction
    each: TensorReduction | None
    device: torch.device


def make_reductions(params: Sequence[Tensor], process_group: Any, clips_each: bool) -> Reductions | None:
    """The sums over processes of an optimizer's parameters; None if no other process shares them.

    `clips_each` tells whether some group has a `clip_norm`. For the other arguments and errors see `make_lanes`.
    """
    total = Reduction(make_lanes(params, process_group, per_tensor=False))
    each = TensorReduction(make_lanes(params, process_group, per_tensor=True)) if clips_each else None
    return Reductions(total, each, meeting_device(params, process_group)) if total else None


class SharedNorm:
    """The sums of the gradients of one plan.

    Args:
        reductions: of the optimizer.
        positions: of the plan's gradients among all parameters, in the order in which their squares come.
        n_params: number of all parameters.

    Attributes:
        device: as that of the reductions.
        is_of_each: whether each gradient has a sum of its own, since some group clips it by that.
    """

    def __init__(self, reductions: Reductions, positions: Sequence[int], n_params: int) -> None:
        self.device = reductions.device
        self._total, self._each = reductions.total.part(positions), reductions.each
        self.is_of_each = self._each is not None
        self._positions, self._n_params = list(positions), n_params
        self._index: dict[torch.device, Tensor] = {}

    def reduce(
        self, squares: Tensor, found_inf: Tensor | None, *, largest: bool = False, skip_nonfinite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sum over all gradients and processes, or that of each gradient over all processes.

        Args:
            squares: float64 [n], sums of squares of the gradients' shards; largest magnitudes for `largest`.
            found_inf: one number, positive if this process must skip; None for 0.
            largest: take the maximum instead, if it is one sum.
            skip_nonfinite: skip on all processes if a sum is infinite or NaN on one, if each has its own.

        Returns:
            float64 [1] or [n], the sums; fp32 [1], positive if any process must skip.
        """
        if self._each is None:
            flag = None if found_inf is None else found_inf.to(squares.device, torch.float64)
            values = self._total.collapse(squares, flag, largest=largest)
            self._total.all_reduce(values, largest=largest)
            return values[1:2], values[:1].float()
        values = squares.new_zeros(1 + self._n_params)
        if found_inf is not None:
            values[0] = found_inf.to(squares.device)
        if skip_nonfinite:
            values[0] += torch.isfinite(squares).all().logical_not()
        index = self._index.get(squares.device)
        if index is None:
            numbers = [1 + position for position in self._positions]
            index = self._index[squares.device] = torch.tensor(numbers, dtype=torch.int64, device=squares.device)
        values[index] = squares
        self._each.all_reduce(values)
        return values[index], values[:1].float()
