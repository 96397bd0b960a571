"""The triton backend: one launch advances all counters of a flattened group, one updates all its tensors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from copy import copy
from functools import reduce
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from dragon.kernels import launch, norm, table
from dragon.kernels.config import default_config
from dragon.vm.torch.optim._chain import Scaling
from dragon.vm.torch.optim._context import DeviceContext
from dragon.vm.torch.optim._flatten import FlattenedGroup, follow_leaders
from dragon.vm.torch.optim._gradients import addresses_of
from dragon.vm.torch.optim._plan import plan_chunks
from dragon.vm.torch.optim._state import ALIGNMENT
from dragon.vm.torch.optim._table import DeviceTable, words_of

_GROUPS, _SOURCES, _COUNTS, _TENSORS, _CHUNKS, _SPANS = range(6)
_WIDTH = int(table.TENSOR_COLUMNS)
_STATE_COLUMNS = (table.STATE_0, table.STATE_1, table.STATE_2)


def real_numel(tensor: Tensor) -> int:
    """Elements of the tensor's real view."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def n_spans(numel: int) -> int:
    """Partial norms of a tensor of `numel` elements."""
    return -(-numel // int(norm.SPAN))


def _name(dtype: torch.dtype) -> str:
    """A dtype's name, of its real view if it is complex."""
    return str(dtype.to_real() if dtype.is_complex else dtype).removeprefix("torch.")


class TritonGroup:
    """The device's view of one flattened group: its table and its launches.

    Args:
        group: the tensors.
        algorithm: "adam" or "sgd".
        context: of the group's device.
        n_groups: parameter groups of the optimizer.
        partials: where this group's partial norms start among those of its device, and how many those are.
        zero_grad: set the gradients to zero on the way.
    """

    def __init__(
        self,
        group: FlattenedGroup,
        algorithm: str,
        context: DeviceContext,
        n_groups: int,
        partials: tuple[int, int],
        zero_grad: bool,
    ) -> None:
        signature = group.signature
        self.group, self._algorithm, self._context = group, algorithm, context
        self._variant = launch.Variant(
            algorithm,
            len(signature.state_keys),
            _name(signature.param_dtype),
            _name(signature.grad_dtype),
            _name(signature.state_dtype),
            signature.average,
            zero_grad,
        )
        numels = list(map(real_numel, group.params))
        self._config = default_config(context.arch)
        self._columns = dict(zip(signature.state_keys, _STATE_COLUMNS, strict=False))
        if signature.average:
            self._columns["ema"] = table.EMA
        if signature.state_keys:
            self._columns["step"] = table.STEP
        self._rows: list[list[float]] = []
        self._sources: list[list[int]] = []
        self._grads = torch.empty(0, dtype=torch.int64, device="cpu")
        self._table = self._build_table(n_groups, partials)
        self.relocate()

    def _build_table(self, n_groups: int, partials: tuple[int, int]) -> DeviceTable:
        numels = [real_numel(param) for param in self.group.params]
        chunks = plan_chunks(numels, self._config.chunk)
        spans = plan_chunks(numels, int(norm.SPAN))
        self._n_chunks, self._n_partials = len(chunks) // 2, len(spans) // 2
        ends = list(accumulate(map(n_spans, numels), initial=partials[0]))
        tensors = array("q", bytes(8 * len(numels) * _WIDTH))
        for column, values in (
            (table.NUMEL, numels),
            (table.GROUP, self.group.rows),
            (table.FIRST_PARTIAL, ends[:-1]),
            (table.END_PARTIAL, ends[1:]),
        ):
            tensors[int(column) :: _WIDTH] = array("q", values)
        device = self._context.device
        device_table = DeviceTable(
            [
                array("q", bytes(8 * n_groups * int(table.GROUP_COLUMNS))),
                array("q", bytes(8 * n_groups * int(table.SOURCE_COLUMNS))),
                array("q", [len(numels), self._n_chunks, partials[1]]),
                tensors,
                array("q", chunks.tobytes()),
                array("q", spans.tobytes()),
            ],
            device,
        )
        self._scalars = torch.empty(len(numels) * int(table.SCALAR_COLUMNS), dtype=torch.float64, device=device)
        self._groups = device_table.section(_GROUPS, torch.float64)
        self._source_table = device_table.section(_SOURCES, torch.int64)
        self._take_sections(device_table)
        return device_table

    def _take_sections(self, device_table: DeviceTable) -> None:
        """Launch on the sections of this table, beside those of the hyperparameters."""
        self._counts = device_table.section(_COUNTS, torch.int64)
        self._tensors = device_table.section(_TENSORS, torch.int64)
        self._chunks = device_table.section(_CHUNKS, torch.int32)
        self._spans = device_table.section(_SPANS, torch.int32)

    def captured(self) -> TritonGroup:
        """This group for a graph: its addresses stand where no later step writes, its hyperparameters here."""
        twin = copy(self)
        twin._table, twin._grads = self._table.twin(), self._grads[:0]
        twin._take_sections(twin._table)
        return twin

    def set_scalars(self, scalars: dict[Any, float]) -> None:
        """Set what `advance_kernel` would have written, the same for all tensors; 0 for what is not given."""
        row = [0.0] * int(table.SCALAR_COLUMNS)
        for column, value in scalars.items():
            row[column] = value
        self._scalars.copy_(torch.tensor(row * len(self.group.params), dtype=torch.float64, device="cpu"))

    def relocate(self) -> None:
        """Write the addresses of parameters and states, which the premises of a step hold fast."""
        columns = {table.PARAM: addresses_of(self.group.params)}
        for key, column in self._columns.items():
            columns[column] = addresses_of([state[key] for state in self.group.states])
        for column, values in columns.items():
            self._write_column(column, values)
        walked = [values for column, values in columns.items() if column is not table.STEP]
        self._combined = reduce(torch.bitwise_or, walked)
        self._grads = self._grads[:0]

    def _write_column(self, column: Any, values: Tensor) -> None:
        self._table.write_column(_TENSORS, values, int(column), _WIDTH)

    def refresh(self, addresses: Tensor, rows: list[list[float]], sources: list[list[int]]) -> None:
        """Bring the table up to date with a step's hyperparameters and addresses of gradients; at most one copy.

        Args:
            addresses: of this group's gradients, int64 on the CPU.
            rows: see `group_row`, one of each parameter group.
            sources: see `source_row`, likewise.
        """
        self._write_hyperparameters(rows, sources)
        if addresses is not self._grads and not torch.equal(addresses, self._grads):
            # Whatever interrupts this, nothing passes for written before it is.
            self._grads = self._grads[:0]
            self._write_column(table.GRAD, addresses)
            misplaced = (self._combined | addresses) & (ALIGNMENT - 1)
            self._write_column(table.VECTOR, misplaced == 0)
            self._grads = addresses
        self._table.upload()

    def publish(self, rows: list[list[float]], sources: list[list[int]]) -> None:
        """Bring the hyperparameters up to date between steps."""
        self._write_hyperparameters(rows, sources)
        self._table.upload()

    def _write_hyperparameters(self, rows: list[list[float]], sources: list[list[int]]) -> None:
        if rows != self._rows:
            self._rows = []
            self._table.write(_GROUPS, words_of(list(chain.from_iterable(rows))))
            self._rows = rows
        if sources != self._sources:
            self._sources = []
            self._table.write(_SOURCES, array("q", chain.from_iterable(sources)))
            self._sources = sources

    @property
    def n_uploads(self) -> int:
        """Host-to-device copies so far."""
        return self._table.n_uploads

    def measure(self, kind: int, partials: Tensor) -> None:
        """Write this group's partial norms."""
        if self._n_partials:
            launch.launch_norm(
                self._variant.grad_dtype,
                kind,
                self._n_partials,
                self._spans,
                self._tensors,
                self._groups,
                partials,
                warp_size=self._context.warp_size,
            )

    def advance(self, scaling: Scaling, kind: int, clip_each: bool, partials: Tensor, status: Tensor) -> None:
        """Advance the counters and write the scalars of this step."""
        context = self._context
        launch.launch_advance(
            self._algorithm,
            kind,
            clip_each,
            len(self.group.params),
            self._counts,
            self._tensors,
            self._groups,
            self._source_table,
            self._scalars,
            partials,
            context.one if scaling.grad_scale is None else scaling.grad_scale,
            context.zero if scaling.found_inf is None else scaling.found_inf,
            status,
            warp_size=context.warp_size,
        )

    def apply(self) -> None:
        """Update the tensors by the scalars."""
        context = self._context
        if self._n_chunks:
            launch.launch_update(
                self._variant,
                self._config,
                self._n_chunks,
                context.n_processors,
                context.warp_size,
                self._counts,
                self._chunks,
                self._tensors,
                self._scalars,
            )
        if self.group.joined_grads is not None:
            follow_leaders(self.group.states)


class TritonSum:
    """One launch that adds gradients to their accumulators, which stand in the table as the parameters.

    Args:
        group: accumulators.
    """

    def __init__(self, group: FlattenedGroup) -> None:
        self._group = group
        self._context = DeviceContext(group.signature.device)
        self._launch = TritonGroup(group, "accumulate", self._context, 1, (0, 0), False)
        self._launch.set_scalars(
            {table.ACTIVE: 1.0, table.GRAD_SCALE: 1.0, table.CLIP: math.inf, table.DECAY: 1.0}
        )

    def fits(self, totals: Sequence[Tensor]) -> bool:
        """Whether accumulators of these lengths are what this launch was planned for."""
        return [total.numel() for total in totals] == [total.numel() for total in self._group.params]

    def add(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        """Add each gradient to its accumulator."""
        self._group.params = totals
        self._launch.relocate()
        with self._context.current():
            self._launch.refresh(addresses_of(grads), [], [])
            self._launch.apply()
