"""All flattened groups of one device: their launches in order, and what these have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from itertools import accumulate
from typing import Any

from dragon.kernels import norm
from dragon.vm.torch.optim._chain import Scaling, needs_norm
from dragon.vm.torch.optim._context import DeviceContext
from dragon.vm.torch.optim._flatten import FlattenedGroup
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._options import Settings
from dragon.vm.torch.optim._rows import group_row, source_row
from dragon.vm.torch.optim._triton import TritonGroup, n_spans, real_numel


class TritonDevice:
    """The flattened groups of one device.

    Args:
        flattened: the groups.
        algorithm: "adam" or "sgd".
        context: of the device.
        n_groups: parameter groups of the optimizer.
        zero_grad: set the gradients to zero on the way.
        counts: report the norm and skipped steps; one device of a step does.
    """

    def __init__(
        self,
        flattened: Sequence[FlattenedGroup],
        algorithm: str,
        context: DeviceContext,
        n_groups: int,
        zero_grad: bool,
        counts: bool,
    ) -> None:
        n_each = [sum(n_spans(real_numel(param)) for param in group.params) for group in flattened]
        firsts = list(accumulate(n_each, initial=0))
        self._algorithm, self._context, self._n_partials = algorithm, context, firsts[-1]
        self._status = context.status if counts else context.spare_status
        self._settings = Settings()
        self._rows: list[list[float]] = []
        self._sources: list[list[int]] = []
        self._clip_each = self._is_live = False
        # The hyperparameters that the rows above hold.
        self._rows_for: object = None
        self.members = [
            TritonGroup(group, algorithm, context, n_groups, (first, firsts[-1]), zero_grad)
            for group, first in zip(flattened, firsts, strict=False)
        ]

    def update(
        self,
        grads: Gradients,
        groups: Sequence[dict[str, Any]],
        numbers: list[tuple[Any, ...]],
        settings: Settings,
        scaling: Scaling,
    ) -> None:
        """Update all tensors: two launches a flattened group, and one more where norms are asked for."""
        context = self._context
        if (numbers, settings) != self._rows_for:
            self._settings = settings
            self._rows, self._sources = self._read_rows(groups)
            self._clip_each = any(group["clip_norm"] for group in groups)
            self._is_live = any(group["capturable"] for group in groups)
            self._rows_for = (numbers, settings)
        kind = int(norm.NO_NORM)
        if needs_norm(settings) or self._clip_each:
            infinite = settings.norm_type == math.inf and not self._clip_each
            kind = int(norm.INF_NORM if infinite else norm.L2_NORM)
        scaling = Scaling(*(None if t is None else t.to(context.device, non_blocking=True) for t in scaling))
        with context.current(), context.in_order() if self._is_live else nullcontext():
            self._launch(grads, kind, scaling)

    def _read_rows(self, groups: Sequence[dict[str, Any]]) -> tuple[list[list[float]], list[list[int]]]:
        rows = [group_row(group, self._algorithm, self._settings) for group in groups]
        return rows, [source_row(group, self._context.device) for group in groups]

    def publish(self, row: int, group: dict[str, Any]) -> None:
        """Bring one group's hyperparameters up to date between steps, in stream order."""
        if row >= len(self._rows):
            return
        (values,), (sources,) = self._read_rows([group])
        self._rows = [*self._rows[:row], values, *self._rows[row + 1 :]]
        self._sources = [*self._sources[:row], sources, *self._sources[row + 1 :]]
        # Not those of the last step any more.
        self._rows_for = None
        with self._context.current(), self._context.in_order():
            for member in self.members:
                member.publish(self._rows, self._sources)

    def captured(self, groups: Sequence[dict[str, Any]]) -> TritonDevice:
        """These groups for a graph, which reads the hyperparameters where this object keeps them up to date.

        Raises:
            RuntimeError: if they are not up to date, for a graph would copy them anew at each replay.
        """
        if self._read_rows(groups) != (self._rows, self._sources):
            raise RuntimeError(
                "a step cannot be captured whose hyperparameters changed unseen since the last one: change them "
                "through optimizer.param_groups with capturable=True set before, or take a step before the capture"
            )
        twin = copy(self)
        twin.members = [member.captured() for member in self.members]
        return twin

    def _launch(self, grads: Gradients, kind: int, scaling: Scaling) -> None:
        context = self._context
        for member in self.members:
            member.refresh(member.group.select_addresses(grads), self._rows, self._sources)
        partials = context.partials(self._n_partials if kind else 0)
        if kind:
            for member in self.members:
                member.measure(kind, partials)
        for member in self.members:
            status = self._status if member is self.members[0] else context.spare_status
            member.advance(scaling, kind, self._clip_each, partials, status)
            member.apply()
