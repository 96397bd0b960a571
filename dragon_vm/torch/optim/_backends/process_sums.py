"""Partial norms of a device, summed over the processes that share the gradients, in stream order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dragon.kernels import norm, table
from dragon.vm.torch.optim._gradients.shared_norm import SharedNorm


class AdvanceTables(NamedTuple):
    """What `advance_kernel` reads of norms: sums in place of partial norms."""

    counts: Tensor
    tensors: Tensor
    partials: Tensor
    found_inf: Tensor


class ProcessSums:
    """The sums of one device, whose tensor table has `n_spans` partial norms for each row."""

    def __init__(self, n_spans: Sequence[int], tensors: Tensor) -> None:
        self._n_rows, self._n_partials = len(n_spans), sum(n_spans)
        self._n_spans = torch.tensor(n_spans, dtype=torch.int64, device=tensors.device)
        self._total_counts = torch.tensor([self._n_rows, 1], device=tensors.device)
        self._each_counts = torch.tensor([self._n_rows, self._n_rows], device=tensors.device)
        self._tensors = tensors
        # Each row's partial norms are its own sum.
        rows = torch.arange(self._n_rows, device=tensors.device)
        by_row = tensors.clone().view(-1, int(table.TENSOR_COLUMNS))[: self._n_rows]
        by_row[:, int(table.FIRST_PARTIAL)], by_row[:, int(table.END_PARTIAL)] = rows, rows + 1
        self._by_row = by_row.reshape(-1)

    def take(
        self,
        shared: SharedNorm,
        partials: Tensor,
        kind: int,
        found_inf: Tensor | None,
        *,
        clip_each: bool,
        skip_nonfinite: bool,
    ) -> AdvanceTables:
        """Sum over processes.

        Args:
            shared: the processes.
            partials: float64, of all rows, in their order.
            kind: L2_NORM or INF_NORM.
            found_inf: fp32 [1], positive if this process must skip; None for 0.
            clip_each: keep the sums of single tensors apart.
            skip_nonfinite: skip on all processes if one of them found an infinity or NaN.
        """
        largest = kind == int(norm.INF_NORM)
        how = "max" if largest else "sum"
        squares = torch.segment_reduce(
            partials[: self._n_partials], how, lengths=self._n_spans, initial=0.0, unsafe=True
        )
        if clip_each:
            sums, flag = shared.each(squares, found_inf, skip_nonfinite=skip_nonfinite)
            return AdvanceTables(self._each_counts, self._by_row, sums, flag)
        total, flag = shared.total(squares, found_inf, largest=largest)
        return AdvanceTables(self._total_counts, self._tensors, total, flag)
