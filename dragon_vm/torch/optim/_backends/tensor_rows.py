"""Tensors as rows of the kernels' tensor table."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.kernels import norm, table
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup, Signature

_STATE_COLUMNS = (table.STATE_0, table.STATE_1, table.STATE_2)
# Elements of a span, which makes one partial norm.
SPAN = int(norm.SPAN)


def real_numel(tensor: Tensor) -> int:
    """Elements of the tensor's real view."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def format_name(form: Format) -> str:
    """A format's name for the kernels: that of a dtype is of its real view."""
    return dtype_name(form.dtype) if isinstance(form, Plain) else form.name


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, of its real view if it is complex."""
    return str(dtype.to_real() if dtype.is_complex else dtype).removeprefix("torch.")


def tensor_rows(
    flattened: Sequence[FlattenedGroup],
    numels: Sequence[int],
    partials: Mapping[int, array[int]] | None = None,
    seed: int = 0,
) -> array[int]:
    """The tensor section of the table, whose rows are the entries of `flattened`, in order.

    `numels` are the elements of each row. `partials` are the columns of partial norms, where norms may be taken.
    """
    width = int(table.TENSOR_COLUMNS)
    entries = [entry for group in flattened for entry in group.entries]
    words = array("q", bytes(8 * len(entries) * width))
    columns: dict[Any, Sequence[int]] = {
        table.PARAM: [entry.param.data_ptr() for entry in entries],
        table.NUMEL: numels,
        table.GROUP: [entry.group_index for entry in entries],
        **(partials or {}),
    }
    for column, values in columns.items():
        words[int(column) :: width] = array("q", values)
    start = 0
    for signature, members in flattened:
        names = _part_columns(signature)
        for entry in members:
            for name, column in names.items():
                words[start + int(column)] = entry.state[name].data_ptr()
            words[start + int(table.WIDE)] = int(dtype_name(signature.param_dtype) == "float64")
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
