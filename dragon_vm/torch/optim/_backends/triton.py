"""The triton backend: one launch advances all counters of a device, one updates all tensors of a signature."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_not
from typing import Any

from torch import Tensor

from dragon.kernels import table
from dragon.vm.torch.optim._backends.context import DeviceContext
from dragon.vm.torch.optim._backends.launches import INF_NORM, L2_NORM, NO_NORM, plan_launches, tensor_rows
from dragon.vm.torch.optim._backends.selection import picker
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.shared_norm import SharedNorm
from dragon.vm.torch.optim._graphs.capture import check_device, is_capturing
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup, Signature
from dragon.vm.torch.optim._options import Group, Settings, Version, needs_norm
from dragon.vm.torch.optim._table.group_table import Columns, GroupTable

_ABSENT = int(table.ABSENT)
_data_ptr: Callable[[Any], int] = Tensor.data_ptr


class TritonDevice:
    """The flattened groups of one device: one table, one advance launch, one update launch a dtype signature.

    With `counts` it reports the norm and skipped steps: one device of a step does.
    """

    def __init__(
        self,
        flattened: Sequence[FlattenedGroup],
        algorithm: str,
        context: DeviceContext,
        n_groups: int,
        n_gathered: int,
        zero_grad: bool,
        columns_of: Columns,
        settings: Settings,
        counts: bool,
    ) -> None:
        positions = [entry.position for group in flattened for entry in group.entries]
        self._context, self._settings = context, settings
        self._pick_own = picker(positions, n_gathered)
        self._status = context.status if counts else context.spare_status
        self.norm = self._status[int(table.GRAD_NORM)]
        self._launches = plan_launches(flattened, algorithm, context, n_groups, zero_grad, settings.rounding_seed)
        self._groups = GroupTable(self._launches.table, context.device, columns_of, settings)
        self._stream = context.stream()
        self._captured_grads: list[Tensor] = []
        self._addresses: list[int] = []

    def update(
        self,
        grads: Sequence[Tensor | None],
        groups: Sequence[Group],
        version: Version,
        scaling: Scaling,
        shared: SharedNorm | None = None,
        kept_scale: Tensor | None = None,
    ) -> None:
        """Update all tensors.

        `grads` are all that the step gathered, None for a parameter that takes no part. Those that stay behind are
        divided by `kept_scale`, or left as they are. `shared` is None where no other process has parts of them.
        """
        context, settings = self._context, self._settings
        check_device(context.device)
        self._groups.write(groups, version)
        kind = NO_NORM
        # All processes skip the step that one must skip: where there are others, a norm is summed with a flag.
        if shared is not None or needs_norm(settings) or self._groups.clips_each:
            kind = INF_NORM if settings.norm_type == math.inf else L2_NORM
        if scaling.grad_scale is not None or scaling.found_inf is not None or kept_scale is not None:
            scaling, kept_scale = Scaling(*map(context.here, scaling)), context.here(kept_scale)
        own = _addresses_of(self._pick_own(grads))
        if kind:
            self._launches.partials.number([address == _ABSENT for address in own] if _ABSENT in own else [])
        context.launch(
            lambda: self._launch(own, kind, scaling, shared, settings.skip_nonfinite, kept_scale),
            in_order=self._groups.is_live,
        )

    def accumulate(self, group: FlattenedGroup, addresses: list[int]) -> None:
        """Add gradients at these addresses to the sums of a group like that of the last call."""
        self._launches.table.write("tensors", tensor_rows([group]))
        row = [0.0] * int(table.GROUP_COLUMNS)
        row[int(table.GRAD_FACTOR)] = 1.0
        # The scalars of a sum stay as the first launch leaves them.
        kind = NO_NORM if self._groups.write_rows([row], [[0] * int(table.SOURCE_COLUMNS)]) else None
        self._context.launch(lambda: self._launch(addresses, kind, Scaling()), in_order=False)

    def _launch(
        self,
        addresses: list[int],
        kind: int | None,
        scaling: Scaling,
        shared: SharedNorm | None = None,
        skip_nonfinite: bool = False,
        kept_scale: Tensor | None = None,
    ) -> None:
        context, launches = self._context, self._launches
        grads = self._place(addresses)
        counts, tensors, groups, sources, _ = launches.sections
        for update, chunks in launches.updates:
            # Who interrupts a compiler must not find steps counted that were not taken.
            update.compile(chunks, tensors, grads, launches.scalars, kept_scale)
        if kind is not None:
            # Without a norm there are none to read.
            partials = context.partials(launches.partials.n_partials) if kind else context.status
            for take_norms, spans in launches.norms.get(kind, ()):
                take_norms(spans, tensors, grads, groups, partials)
            rows, found_inf = tensors, context.zero if scaling.found_inf is None else scaling.found_inf
            if shared is not None:
                counts, rows, partials, found_inf = launches.partials.sums(tensors).take(
                    shared, partials, kind, scaling.found_inf, skip_nonfinite
                )
            scale = context.one if scaling.grad_scale is None else scaling.grad_scale
            tables = counts, rows, grads, groups, sources, launches.scalars, partials
            launches.advances[kind, self._groups.clips_each](*tables, scale, found_inf, self._status)
        for update, chunks in launches.updates:
            update(chunks, tensors, grads, launches.scalars, kept_scale)

    def _place(self, addresses: list[int]) -> Tensor:
        """Bring the device's table up to date, in at most one copy; return the section of the gradients."""
        device_table = self._launches.table
        if is_capturing():
            # Later steps write other addresses to the table: a graph has its own.
            if not device_table.is_uploaded:
                raise RuntimeError(
                    "a step cannot be captured whose hyperparameters changed unseen since the last one, or other "
                    "gradients are there than then: change hyperparameters through optimizer.param_groups with "
                    "capturable=True set before, or take such a step first"
                )
            self._captured_grads.append(device_table.captured_copy("grads", array("q", addresses)))
            return self._captured_grads[-1]
        self._context.record(self._stream, [device_table.buffer, self._launches.scalars])
        if addresses != self._addresses:
            # Whatever interrupts this, nothing passes for written before it is.
            self._addresses = []
            device_table.write("grads", array("q", addresses))
            self._addresses = addresses
        if self._groups.is_live:
            device_table.expect_capture("grads")
        device_table.upload()
        return self._launches.sections[-1]

    def publish(self, index: int, group: Group) -> None:
        """Bring one group's hyperparameters up to date between steps, in stream order."""
        if self._groups.write_one(index, group):
            self._context.launch(self._launches.table.upload, in_order=True)


class SumLaunch:
    """One launch that adds gradients to sums of one signature."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._numels: list[int] = []
        self._device: TritonDevice | None = None

    def add(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        """Add each gradient to its sum, which stands in the table as the parameter."""
        group = FlattenedGroup(self._signature, [Entry(total, {}, 0, i) for i, total in enumerate(totals)])
        numels = [total.numel() for total in totals]
        device = self._device
        if device is None or numels != self._numels:
            context = DeviceContext(self._signature.device)
            device = TritonDevice(
                [group], "accumulate", context, 1, len(totals), False, lambda group: {}, Settings(), counts=False
            )
        # Whatever interrupts a launch, no device passes for one of other numels: the last write makes it valid.
        self._device = None
        device.accumulate(group, [grad.data_ptr() for grad in grads])
        self._numels = numels
        self._device = device


def _addresses_of(grads: Sequence[Tensor | None]) -> list[int]:
    """Addresses of gradients, for the kernels' table."""
    if all(map(is_not, grads, repeat(None))):
        return list(map(_data_ptr, grads))
    return [_ABSENT if grad is None else grad.data_ptr() for grad in grads]
