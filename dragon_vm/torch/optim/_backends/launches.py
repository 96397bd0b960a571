"""The launches of a device: its table, cut into chunks and spans."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, product
from typing import NamedTuple

import torch
from torch import Tensor

from dragon.kernels import norm, table
from dragon.kernels.archs import sum_dtype
from dragon.kernels.launch import Launcher, advance_launcher, norm_launcher, update_launcher
from dragon.kernels.spec import Spec
from dragon.vm.torch.optim._backends.configs import config_for
from dragon.vm.torch.optim._backends.context import DeviceContext, Hardware
from dragon.vm.torch.optim._backends.partials import PartialNorms
from dragon.vm.torch.optim._backends.tensor_rows import (
    SPAN,
    dtype_name,
    format_name,
    real_numel,
    tensor_rows,
)
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup, Signature
from dragon.vm.torch.optim._table.chunks import plan_chunks
from dragon.vm.torch.optim._table.table import DeviceTable, packed

# The kernels' constants as integers: each conversion calls Python.
NO_NORM, L2_NORM, INF_NORM = map(int, (norm.NO_NORM, norm.L2_NORM, norm.INF_NORM))
NORMS = (L2_NORM, INF_NORM)


class UpdateLaunch(NamedTuple):
    """One update launch: all chunks of the tensors that share a `Spec`."""

    launch: Launcher
    chunks: Tensor


class NormLaunch(NamedTuple):
    """One launch that takes partial norms: all spans of the gradients of one dtype, by the kind of norm."""

    launches: dict[int, Launcher]
    spans: Tensor

    @classmethod
    def of(cls, grad_dtype: str, n_spans: int, spans: Tensor, hardware: Hardware) -> NormLaunch:
        """Those of a section of the table, which may be longer than its spans."""
        how = hardware.warp_size, sum_dtype(hardware.arch)
        return cls({kind: norm_launcher(grad_dtype, kind, n_spans, *how) for kind in NORMS}, spans)


class Sections(NamedTuple):
    """The sections of the table that all launches of a device share."""

    counts: Tensor
    tensors: Tensor
    groups: Tensor
    sources: Tensor
    grads: Tensor

    @classmethod
    def of(cls, device_table: DeviceTable) -> Sections:
        """The sections of a table."""
        dtypes = {"groups": torch.float64}
        return cls(*(device_table.section(name, dtypes.get(name, torch.int64)) for name in cls._fields))


class Launches(NamedTuple):
    """The table of a device, and the launches on it.

    Attributes:
        table: all sections.
        sections: those that launches share.
        scalars: scratch memory that `advance_kernel` writes.
        advances: by the kind of norm, and by whether each gradient is clipped by its own.
        updates: update launches.
        norms: launches of the norm.
        numels: elements of each row.
        n_partials: partial norms of all rows.
    """

    table: DeviceTable
    sections: Sections
    scalars: Tensor
    advances: dict[tuple[int, bool], Launcher]
    updates: list[UpdateLaunch]
    norms: list[NormLaunch]
    numels: list[int]
    n_partials: int


def plan_launches(
    flattened: Sequence[FlattenedGroup],
    algorithm: str,
    context: DeviceContext,
    n_groups: int,
    zero_grad: bool,
    seed: int,
) -> Launches:
    """Lay out the table of a device, whose rows are the entries of `flattened`, in order."""
    entries = list(chain.from_iterable(group.entries for group in flattened))
    numels = [real_numel(entry.param) for entry in entries]
    partials = PartialNorms.of([entry.position for entry in entries], numels)
    n_partials = sum(partials.counts)
    contents = {
        # These change from step to step; one copy takes them all.
        "groups": array("q", bytes(8 * n_groups * int(table.GROUP_COLUMNS))),
        "sources": array("q", bytes(8 * n_groups * int(table.SOURCE_COLUMNS))),
        "grads": array("q", bytes(8 * len(entries))),
        "counts": array("q", [len(entries), n_partials]),
        "tensors": tensor_rows(flattened, numels, partials.columns(), seed),
    }
    hardware, planned, first = context.hardware, [], 0
    rows_by_dtype: dict[str, list[int]] = {}
    for index, group in enumerate(flattened):
        rows = range(first, first + len(group.entries))
        first = rows.stop
        spec, own = _spec(algorithm, group.signature, zero_grad), numels[rows.start : rows.stop]
        config = config_for(spec, hardware.arch, hardware.name, own)
        pairs = plan_chunks(own, config.chunk, rows)
        contents[f"chunks {index}"] = packed(array("i", [len(pairs) // 2, 0]) + pairs)
        planned.append((spec, config, len(pairs) // 2))
        rows_by_dtype.setdefault(spec.grad, []).extend(rows)
    spans = {
        dtype: plan_chunks([numels[row] for row in rows], SPAN, rows) for dtype, rows in rows_by_dtype.items()
    }
    contents |= {f"spans {dtype}": packed(pairs) for dtype, pairs in spans.items()}
    device_table = DeviceTable(contents, context.device)
    updates = [
        UpdateLaunch(
            update_launcher(spec, config, n_chunks, hardware.n_processors, hardware.warp_size),
            device_table.section(f"chunks {index}", torch.int32),
        )
        for index, (spec, config, n_chunks) in enumerate(planned)
        if n_chunks
    ]
    norms = [
        NormLaunch.of(dtype, len(pairs) // 2, device_table.section(f"spans {dtype}", torch.int32), hardware)
        for dtype, pairs in spans.items()
        if pairs
    ]
    advances = {
        key: advance_launcher(algorithm, *key, len(entries), hardware.warp_size)
        for key in product((NO_NORM, *NORMS), (False, True))
    }
    scalars = torch.empty(len(entries) * int(table.SCALAR_COLUMNS), dtype=torch.float64, device=context.device)
    return Launches(device_table, Sections.of(device_table), scalars, advances, updates, norms, numels, n_partials)


def _spec(algorithm: str, signature: Signature, zero_grad: bool) -> Spec:
    return Spec(
        algorithm,
        format_name(signature.formats[0]),
        dtype_name(signature.grad_dtype),
        tuple(map(format_name, signature.state_formats)),
        None if signature.ema_dtype is None else dtype_name(signature.ema_dtype),
        zero_grad,
    )
