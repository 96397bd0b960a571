"""The triton backend: one launch advances all counters of a device, one updates all tensors of a signature."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.kernels import launch, norm, table
from dragon.kernels.config import LaunchConfig
from dragon.kernels.spec import Spec
from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._backends.configs import config_for
from dragon.vm.torch.optim._backends.context import DeviceContext
from dragon.vm.torch.optim._backends.process_sums import AdvanceTables, ProcessSums
from dragon.vm.torch.optim._backends.selection import picker
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.shared_norm import SharedNorm
from dragon.vm.torch.optim._graphs.capture import is_capturing
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup, Signature
from dragon.vm.torch.optim._options import Settings, needs_norm
from dragon.vm.torch.optim._table.chunks import n_chunks, plan_chunks
from dragon.vm.torch.optim._table.rows import (
    dtype_name,
    format_name,
    group_row,
    real_numel,
    source_row,
    tensor_rows,
)
from dragon.vm.torch.optim._table.table import DeviceTable, packed, words_of

_SPAN = int(norm.SPAN)

Group = dict[str, Any]


class _Launch(NamedTuple):
    """One update launch: all chunks of the tensors that share a `Spec`."""

    spec: Spec
    config: LaunchConfig
    n_chunks: int
    chunks: Tensor


class _Reduction(NamedTuple):
    """One launch that takes partial norms: all spans of the gradients of one dtype."""

    grad_dtype: str
    n_spans: int
    spans: Tensor


class TritonDevice:
    """The flattened groups of one device: one table, one advance launch, one update launch a dtype signature.

    Args:
        flattened: the groups.
        algorithm: its name for the kernels.
        context: of the device.
        n_groups: parameter groups of the optimizer.
        n_gathered: how many tensors a step gathers.
        zero_grad: set the gradients to zero on the way.
        counts: report the norm and skipped steps; one device of a step does.
        seed: of random words.
    """

    def __init__(
        self,
        flattened: Sequence[FlattenedGroup],
        algorithm: str,
        context: DeviceContext,
        n_groups: int,
        n_gathered: int,
        zero_grad: bool,
        counts: bool,
        seed: int = 0,
    ) -> None:
        entries = list(chain.from_iterable(group.entries for group in flattened))
        self._algorithm, self._context, self._n_tensors = algorithm, context, len(entries)
        self._pick_own = picker([entry.position for entry in entries], n_gathered)
        self._status = context.status if counts else context.spare_status
        numels = [real_numel(entry.param) for entry in entries]
        specs = [_spec(algorithm, group.signature, zero_grad) for group in flattened]
        firsts = list(accumulate((len(group.entries) for group in flattened), initial=0))
        rows = list(starmap(range, pairwise(firsts)))
        configs = [
            config_for(spec, context.arch, context.name, numels[chosen.start : chosen.stop])
            for spec, chosen in zip(specs, rows, strict=True)
        ]
        chunks = [
            plan_chunks(numels[chosen.start : chosen.stop], config.chunk, chosen)
            for config, chosen in zip(configs, rows, strict=True)
        ]
        by_dtype: dict[str, list[int]] = {}
        for spec, chosen in zip(specs, rows, strict=True):
            by_dtype.setdefault(spec.grad, []).extend(chosen)
        spans = {
            dtype: plan_chunks([numels[row] for row in chosen], _SPAN, chosen)
            for dtype, chosen in by_dtype.items()
        }
        self._n_spans = [n_chunks(numel, _SPAN) for numel in numels]
        self._n_partials = sum(self._n_spans)
        sections = {
            # These change from step to step; one copy takes them all.
            "groups": array("q", bytes(8 * n_groups * int(table.GROUP_COLUMNS))),
            "sources": array("q", bytes(8 * n_groups * int(table.SOURCE_COLUMNS))),
            "grads": array("q", bytes(8 * len(entries))),
            "counts": array("q", [len(entries), self._n_partials]),
            "tensors": tensor_rows(entries, numels, [group.signature for group in flattened], firsts, seed),
        }
        for index, pairs in enumerate(chunks):
            sections[f"chunks {index}"] = packed(array("i", [len(pairs) // 2, 0]) + pairs)
        sections |= {f"spans {dtype}": packed(pairs) for dtype, pairs in spans.items()}
        self._table = DeviceTable(sections, context.device)
        self._launches = [
            _Launch(spec, config, len(pairs) // 2, self._table.section(f"chunks {index}", torch.int32))
            for index, (spec, config, pairs) in enumerate(zip(specs, configs, chunks, strict=True))
            if pairs
        ]
        self._reductions = [
            _Reduction(dtype, len(pairs) // 2, self._table.section(f"spans {dtype}", torch.int32))
            for dtype, pairs in spans.items()
            if pairs
        ]
        n_scalars = len(entries) * int(table.SCALAR_COLUMNS)
        self._scalars = torch.empty(n_scalars, dtype=torch.float64, device=context.device)
        self._grads = self._table.section("grads")
        self._tensors, self._counts = self._table.section("tensors"), self._table.section("counts")
        self._groups, self._sources = self._table.section("groups", torch.float64), self._table.section("sources")
        self._sums: ProcessSums | None = None
        self._stream = context.stream()
        self._captured_grads: list[Tensor] = []
        # Rows of the groups in the table, and what they were written for.
        self._rows: list[list[float]] = []
        self._source_rows: list[list[int]] = []
        self._version: object = None
        self._addresses: list[int] = []
        self._clip_each = self._is_live = False

    @property
    def n_uploads(self) -> int:
        """Host-to-device copies so far."""
        return self._table.n_uploads

    def update(
        self,
        addresses: Sequence[int],
        groups: Sequence[Group],
        algorithm: Algorithm,
        version: int,
        settings: Settings,
        scaling: Scaling,
        shared: SharedNorm | None = None,
    ) -> None:
        """Update all tensors.

        Args:
            addresses: of all gradients that the step gathered.
            groups: parameter groups.
            algorithm: what is computed.
            version: of the hyperparameters; a new one after each change.
            settings: options that decide about norms and skipping.
            scaling: a `GradScaler`'s.
            shared: sums over the processes that share the gradients; None if there are no others.
        """
        context = self._context
        if (version, settings) != self._version:
            self._version = None
            self._write_groups(
                [group_row(group, algorithm, settings) for group in groups],
                [source_row(group, context.device) for group in groups],
            )
            self._clip_each = any(group["clip_norm"] for group in groups)
            self._is_live = any(group["capturable"] for group in groups)
            self._version = (version, settings)
        kind = int(norm.NO_NORM)
        if needs_norm(settings) or self._clip_each:
            infinite = settings.norm_type == math.inf and not self._clip_each
            kind = int(norm.INF_NORM if infinite else norm.L2_NORM)
        scaling = Scaling(*(None if t is None else t.to(context.device, non_blocking=True) for t in scaling))
        own = list(self._pick_own(addresses))
        if shared is not None and not kind and scaling.found_inf is not None:
            # All processes skip the step that one must skip.
            kind = int(norm.L2_NORM)
        context.launch(
            lambda: self._launch(own, kind, scaling, shared, settings.skip_nonfinite), in_order=self._is_live
        )

    def accumulate(self, group: FlattenedGroup, addresses: list[int]) -> None:
        """Add gradients at these addresses to the sums of a group like that of the last call."""
        numels = [real_numel(entry.param) for entry in group.entries]
        self._table.write("tensors", tensor_rows(group.entries, numels, [group.signature], [0, len(numels)]))
        kind = None
        if not self._rows:
            row = [0.0] * int(table.GROUP_COLUMNS)
            row[int(table.GRAD_FACTOR)] = 1.0
            self._write_groups([row], [[0] * int(table.SOURCE_COLUMNS)])
            # The scalars of a sum stay as the first launch leaves them.
            kind = int(norm.NO_NORM)
        self._context.launch(lambda: self._launch(addresses, kind, Scaling()), in_order=False)

    def _launch(
        self,
        addresses: list[int],
        kind: int | None,
        scaling: Scaling,
        shared: SharedNorm | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        context = self._context
        grads = self._place(addresses)
        if kind is not None:
            partials = context.partials(self._n_partials if kind else 0)
            found_inf = context.zero if scaling.found_inf is None else scaling.found_inf
            read = AdvanceTables(self._counts, self._tensors, partials, found_inf)
            if kind:
                for reduction in self._reductions:
                    launch.launch_norm(
                        reduction.grad_dtype,
                        kind,
                        reduction.n_spans,
                        reduction.spans,
                        self._tensors,
                        grads,
                        self._groups,
                        partials,
                        warp_size=context.warp_size,
                    )
            if kind and shared is not None:
                if self._sums is None:
                    self._sums = ProcessSums(self._n_spans, self._tensors)
                read = self._sums.take(
                    shared,
                    partials,
                    kind,
                    scaling.found_inf,
                    clip_each=self._clip_each,
                    skip_nonfinite=skip_nonfinite,
                )
            launch.launch_advance(
                self._algorithm,
                kind,
                self._clip_each,
                self._n_tensors,
                read.counts,
                read.tensors,
                self._groups,
                self._sources,
                self._scalars,
                read.partials,
                context.one if scaling.grad_scale is None else scaling.grad_scale,
                read.found_inf,
                self._status,
                warp_size=context.warp_size,
            )
        for update in self._launches:
            launch.launch_update(
                update.spec,
                update.config,
                update.n_chunks,
                context.n_processors,
                context.warp_size,
                update.chunks,
                self._tensors,
                grads,
                self._scalars,
            )

    def _place(self, addresses: list[int]) -> Tensor:
        """Bring the device's table up to date, in at most one copy; return the section of the gradients."""
        if is_capturing():
            # Later steps write other addresses to the table: a graph has its own.
            if not self._table.is_uploaded:
                raise RuntimeError(
                    "a step cannot be captured whose hyperparameters changed unseen since the last one: change "
                    "them through optimizer.param_groups with capturable=True set before, or take a step first"
                )
            self._captured_grads.append(self._table.captured_copy("grads", array("q", addresses)))
            return self._captured_grads[-1]
        self._context.record(self._stream, [self._table.buffer, self._scalars])
        if addresses != self._addresses:
            # Whatever interrupts this, nothing passes for written before it is.
            self._addresses = []
            self._table.write("grads", array("q", addresses))
            self._addresses = addresses
        if self._is_live:
            self._table.expect_capture("grads")
        self._table.upload()
        return self._grads

    def publish(self, index: int, group: Group, algorithm: Algorithm, settings: Settings) -> None:
        """Bring one group's hyperparameters up to date between steps, in stream order."""
        if index >= len(self._rows):
            return
        rows, sources = list(self._rows), list(self._source_rows)
        rows[index] = group_row(group, algorithm, settings)
        sources[index] = source_row(group, self._context.device)
        # Not those of the last step any more.
        self._version = None
        self._write_groups(rows, sources)
        self._context.launch(self._table.upload, in_order=True)

    def _write_groups(self, rows: list[list[float]], sources: list[list[int]]) -> None:
        if rows != self._rows:
            self._rows = []
            self._table.write("groups", words_of(list(chain.from_iterable(rows))))
            self._rows = rows
        if sources != self._source_rows:
            self._source_rows = []
            self._table.write("sources", array("q", chain.from_iterable(sources)))
            self._source_rows = sources


def _spec(algorithm: str, signature: Signature, zero_grad: bool) -> Spec:
    return Spec(
        algorithm,
        format_name(signature.formats[0]),
        dtype_name(signature.grad_dtype),
        tuple(map(format_name, signature.state_formats)),
        None if signature.ema_dtype is None else dtype_name(signature.ema_dtype),
        zero_grad,
    )
