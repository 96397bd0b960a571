"""Partial norms of a device: their numbering, and their sums over processes, in stream order."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dragon.kernels import norm, table
from dragon.vm.torch.optim._gradients.shared_norm import SharedNorm
from dragon.vm.torch.optim._table.chunks import n_chunks
from dragon.vm.torch.optim._table.table import DeviceTable

# Elements of a span, which makes one partial norm.
SPAN = int(norm.SPAN)


class PartialNorms(NamedTuple):
    """Where the partial norms of the rows stand: in the order of the parameters, whatever else the table holds.

    A norm's last bits depend on that order.

    Attributes:
        rows: those with a gradient, in this order.
        counts: how many partial norms each of them has.
        firsts: the first one of each row of the table; rows without a gradient stand behind all others.
        ends: what comes after each row's last one.
    """

    rows: list[int]
    counts: list[int]
    firsts: array[int]
    ends: array[int]

    @classmethod
    def of(cls, positions: Sequence[int], numels: Sequence[int], absent: Sequence[bool] = ()) -> PartialNorms:
        """Those of rows at these positions among the parameters, with so many elements."""
        order = sorted(range(len(positions)), key=positions.__getitem__)
        if absent:
            order.sort(key=absent.__getitem__)
        counts = [n_chunks(numels[row], SPAN) for row in order]
        firsts, ends = array("q", bytes(8 * len(order))), array("q", bytes(8 * len(order)))
        for row, (first, end) in zip(order, pairwise(accumulate(counts, initial=0)), strict=True):
            firsts[row], ends[row] = first, end
        n_present = len(order) - sum(absent)
        return cls(order[:n_present], counts[:n_present], firsts, ends)


class Partials:
    """The numbering of a device's partial norms, for the gradients of the last step that had a norm.

    It stands in the table, where kernels read it. `positions` are those of the rows among the parameters.

    Attributes:
        n_partials: partial norms of all rows.
    """

    def __init__(self, positions: Sequence[int], numels: Sequence[int], device_table: DeviceTable) -> None:
        self._positions, self._numels, self._table = positions, numels, device_table
        self._absent: list[bool] | None = None
        self._sums: ProcessSums | None = None
        self.number([])
        self.n_partials = sum(self._numbered.counts)

    def number(self, absent: list[bool]) -> None:
        """Number them as if the rows with a gradient were all that there are; empty if all have one."""
        if absent == self._absent:
            return
        # Whatever interrupts this, nothing passes for written before it is.
        self._absent = self._sums = None
        self._numbered = numbered = PartialNorms.of(self._positions, self._numels, absent)
        for column, words in ((table.FIRST_PARTIAL, numbered.firsts), (table.END_PARTIAL, numbered.ends)):
            self._table.write("tensors", words, int(column), int(table.TENSOR_COLUMNS))
        self._table.write("counts", array("q", [len(self._positions), sum(numbered.counts)]))
        self._absent = absent

    def sums(self, tensors: Tensor) -> ProcessSums:
        """Their sums over processes; `tensors` is the section of the table on the device."""
        if self._sums is None:
            self._sums = ProcessSums(self._numbered, tensors)
        return self._sums


class ProcessSums:
    """The sums of one device, for one set of gradients."""

    def __init__(self, own: PartialNorms, tensors: Tensor) -> None:
        device, n_rows, n_present = tensors.device, len(own.firsts), len(own.rows)
        self._n_partials = sum(own.counts)
        self._counts = torch.tensor(own.counts, dtype=torch.int64, device=device)
        self._total_counts = torch.tensor([n_rows, 1], device=device)
        self._each_counts = torch.tensor([n_rows, n_present], device=device)
        self._tensors = tensors
        # In place of each row's partial norms stands their sum; a row without a gradient has none.
        rows = torch.tensor(own.rows, dtype=torch.int64, device=device)
        places = torch.arange(n_present, device=device)
        by_row = tensors.clone().view(-1, int(table.TENSOR_COLUMNS))[:n_rows]
        by_row[:, int(table.FIRST_PARTIAL)], by_row[:, int(table.END_PARTIAL)] = 0, 0
        by_row[rows, int(table.FIRST_PARTIAL)], by_row[rows, int(table.END_PARTIAL)] = places, places + 1
        self._by_row = by_row.reshape(-1)

    def take(
        self, shared: SharedNorm, partials: Tensor, kind: int, found_inf: Tensor | None, skip_nonfinite: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum over processes.

        Args:
            shared: the processes.
            partials: float64, of all rows, in the order of the parameters.
            kind: L2_NORM or INF_NORM.
            found_inf: fp32 [1], positive if this process must skip; None for 0.
            skip_nonfinite: skip on all processes if one of them found an infinity or NaN.

        Returns:
            What `advance_kernel` reads, with sums in place of partial norms: counts, tensors, sums, and found_inf.
        """
        largest = kind == int(norm.INF_NORM)
        how = "max" if largest else "sum"
        squares = torch.segment_reduce(
            partials[: self._n_partials], how, lengths=self._counts, initial=0.0, unsafe=True
        )
        sums, flag = shared.reduce(squares, found_inf, largest=largest, skip_nonfinite=skip_nonfinite)
        counts, tensors = (
            (self._each_counts, self._by_row) if shared.is_of_each else (self._total_counts, self._tensors)
        )
        return counts, tensors, sums, flag
