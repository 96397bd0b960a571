"""The launches of a device: its table, cut into chunks and spans."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.kernels import norm, table
from dragon.kernels.archs import sum_dtype
from dragon.kernels.launch import Launcher, advance_launcher, norm_launcher, update_launcher
from dragon.kernels.spec import Spec
from dragon.vm.torch.optim._backends.configs import config_for
from dragon.vm.torch.optim._backends.context import DeviceContext
from dragon.vm.torch.optim._backends.partials import SPAN, Partials
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup, Signature
from dragon.vm.torch.optim._table.chunks import plan_chunks
from dragon.vm.torch.optim._table.table import DeviceTable, words_of

# The kernels' constants as integers: each conversion calls Python.
NO_NORM, L2_NORM, INF_NORM = map(int, (norm.NO_NORM, norm.L2_NORM, norm.INF_NORM))
NORMS = (L2_NORM, INF_NORM)
# The sections of a table that all launches of a device share.
_SHARED = ("counts", "tensors", "groups", "sources", "grads")
_STATE_COLUMNS = (table.STATE_0, table.STATE_1, table.STATE_2)


class Launches(NamedTuple):
    """The table of a device, and the launches on it.

    Attributes:
        sections: of the table, those of `_SHARED`.
        scalars: scratch memory that `advance_kernel` writes.
        advances: by the kind of norm, and by whether each gradient is clipped by its own.
        updates: launches for the tensors that share a `Spec`, each with all their chunks.
        norms: by the kind of norm, launches for the gradients of one dtype, each with all their spans.
    """

    table: DeviceTable
    sections: list[Tensor]
    scalars: Tensor
    advances: dict[tuple[int, bool], Launcher]
    updates: list[tuple[Launcher, Tensor]]
    norms: dict[int, list[tuple[Launcher, Tensor]]]
    partials: Partials


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
    numels = [as_real(entry.param).numel() for entry in entries]
    contents = {
        # These change from step to step; one copy takes them all.
        "groups": array("q", bytes(8 * n_groups * int(table.GROUP_COLUMNS))),
        "sources": array("q", bytes(8 * n_groups * int(table.SOURCE_COLUMNS))),
        "grads": array("q", bytes(8 * len(entries))),
        "counts": array("q", bytes(16)),
        "tensors": tensor_rows(flattened, seed),
    }
    hardware, first = context.hardware, 0
    updates: dict[str, Launcher] = {}
    rows_of: dict[str, list[int]] = {}
    for index, group in enumerate(flattened):
        rows = range(first, first + len(group.entries))
        first = rows.stop
        spec, own = _spec(algorithm, group.signature, zero_grad), numels[rows.start : rows.stop]
        config = config_for(spec, hardware.arch, hardware.name, own)
        pairs = plan_chunks(own, config.chunk, rows)
        contents[f"chunks {index}"] = words_of(array("i", [len(pairs) // 2, 0]) + pairs)
        if pairs:
            launch = spec, config, len(pairs) // 2, hardware.n_processors, hardware.warp_size
            updates[f"chunks {index}"] = update_launcher(*launch)
        rows_of.setdefault(spec.grad, []).extend(rows)
    norms: dict[int, dict[str, Launcher]] = {kind: {} for kind in NORMS}
    for dtype, own_rows in rows_of.items():
        pairs = plan_chunks([numels[row] for row in own_rows], SPAN, own_rows)
        # A section may be longer than its spans.
        contents[f"spans {dtype}"] = words_of(pairs)
        for kind in NORMS if pairs else ():
            how = hardware.warp_size, sum_dtype(hardware.arch)
            norms[kind][f"spans {dtype}"] = norm_launcher(dtype, kind, len(pairs) // 2, *how)
    advances = {
        key: advance_launcher(algorithm, *key, len(entries), hardware.warp_size)
        for key in product((NO_NORM, *NORMS), (False, True))
    }
    scalars = torch.empty(len(entries) * int(table.SCALAR_COLUMNS), dtype=torch.float64, device=context.device)
    device_table = DeviceTable(contents, context.device)
    dtypes = {"groups": torch.float64}
    sections = [device_table.section(name, dtypes.get(name, torch.int64)) for name in _SHARED]

    def placed(launchers: dict[str, Launcher]) -> list[tuple[Launcher, Tensor]]:
        return [(each, device_table.section(name, torch.int32)) for name, each in launchers.items()]

    placed_norms = {kind: placed(own) for kind, own in norms.items()}
    partials = Partials([entry.position for entry in entries], numels, device_table)
    return Launches(device_table, sections, scalars, advances, placed(updates), placed_norms, partials)


def _spec(algorithm: str, signature: Signature, zero_grad: bool) -> Spec:
    return Spec(
        algorithm,
        _format_name(signature.formats[0]),
        _dtype_name(signature.grad_dtype),
        tuple(map(_format_name, signature.state_formats)),
        None if signature.ema_dtype is None else _dtype_name(signature.ema_dtype),
        zero_grad,
    )


def _format_name(form: Format) -> str:
    """A format's name for the kernels: that of a dtype is of its real view."""
    return _dtype_name(form.dtype) if isinstance(form, Plain) else form.name


def _dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, of its real view if it is complex."""
    return str(dtype.to_real()).removeprefix("torch.")


def tensor_rows(flattened: Sequence[FlattenedGroup], seed: int = 0) -> array[int]:
    """The tensor section of the table but for partial norms: its rows are the entries of `flattened`, in order."""
    width = int(table.TENSOR_COLUMNS)
    entries = [entry for group in flattened for entry in group.entries]
    words = array("q", bytes(8 * len(entries) * width))
    columns: dict[Any, Sequence[int]] = {
        table.PARAM: [entry.param.data_ptr() for entry in entries],
        table.NUMEL: [as_real(entry.param).numel() for entry in entries],
        table.GROUP: [entry.group_index for entry in entries],
    }
    for column, values in columns.items():
        words[int(column) :: width] = array("q", values)
    start = 0
    for signature, members, _ in flattened:
        names = _part_columns(signature)
        for entry in members:
            for name, column in names.items():
                words[start + int(column)] = entry.state[name].data_ptr()
            words[start + int(table.WIDE)] = int(_dtype_name(signature.param_dtype) == "float64")
            if signature.is_stochastic:
                words[start + int(table.INDEX_BASE)] = entry.first
                words[start + int(table.STREAM)] = entry.stream
                words[start + int(table.SEED)] = seed
            start += width
    return words


def _part_columns(signature: Signature) -> dict[str, Any]:
    """The columns of a tensor's state entries, by their names."""
    own, *states = signature.part_keys
    names: dict[str, Any] = dict(zip(own[1:], (table.PARAM_REST,), strict=False))
    for keys, column in zip(states, _STATE_COLUMNS, strict=False):
        names[keys[0]] = column
    for keys, column in zip(states, (table.SCALE_0, table.SCALE_1), strict=False):
        names |= dict.fromkeys(keys[1:], column)
    if signature.ema_dtype is not None:
        names["ema"] = table.EMA
    if signature.counts_steps:
        names["step"] = table.STEP
    return names
