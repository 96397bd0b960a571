"""Parameter groups as rows of the kernels' hyperparameter and source tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dragon.kernels import table
from dragon.vm.torch.optim._algorithms.algorithm import host_number
from dragon.vm.torch.optim._gradients.scaling import clip_value, group_factor
from dragon.vm.torch.optim._options import Settings
from dragon.vm.torch.optim._table.table import DeviceTable, words_of

# Maps a group to an algorithm's own hyperparameters, by the name of their column.
Columns = Callable[[Mapping[str, Any]], dict[str, float]]

# The kernels' constants as integers: each conversion calls Python.
_COLUMNS = {name: int(value) for name, value in vars(table).items() if isinstance(value, tl.constexpr)}
_LR = _COLUMNS["LR"]
_N_COLUMNS, _N_SOURCES = _COLUMNS["GROUP_COLUMNS"], _COLUMNS["SOURCE_COLUMNS"]
_SOURCES = (
    (_COLUMNS["LR_SOURCE"], "lr", None),
    (_COLUMNS["BETA1_SOURCE"], "betas", 0),
    (_COLUMNS["BETA2_SOURCE"], "betas", 1),
)


def group_row(group: dict[str, Any], columns_of: Columns, settings: Settings) -> list[float]:
    """A group's row of the hyperparameter table; tensors on a device stand in the source table instead."""
    row = [0.0] * _N_COLUMNS
    columns = {
        "LR": host_number(group["lr"]),
        "WEIGHT_DECAY": float(group["weight_decay"]),
        "GRAD_FACTOR": group_factor(group),
        "CLIP_VALUE": clip_value(group),
        "CLIP_NORM": float(group["clip_norm"]),
        "MAX_GRAD_NORM": float(settings.max_grad_norm),
        "EMA_DECAY": float(group["ema_decay"]),
        "SKIP_NONFINITE": float(settings.skip_nonfinite),
        **columns_of(group),
    }
    for name, value in columns.items():
        row[_COLUMNS[name]] = value
    return row


def write_rates(device_table: DeviceTable, rows: Sequence[list[float]], rates: Sequence[float]) -> None:
    """Write other learning rates into groups' rows, and into the table where they stand."""
    device_table.write_column("groups", _LR, _N_COLUMNS, words_of(rates))
    for row, rate in zip(rows, rates, strict=True):
        row[_LR] = rate


def source_row(group: dict[str, Any], device: torch.device) -> list[int]:
    """Addresses of a group's hyperparameters that are tensors on the device, 0 for the others.

    Raises:
        ValueError: for a tensor of another device or dtype than the kernels can read.
    """
    row = [0] * _N_SOURCES
    for column, key, index in _SOURCES:
        value = group.get(key) if index is None else group.get(key, (None, None))[index]
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            continue
        if value.device != device or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{key} must be a number, or a float32 or float64 tensor on {device} or the CPU, "
                f"but got {value.dtype} on {value.device}"
            )
        row[column] = value.data_ptr() | (value.dtype == torch.float64)
    return row
