"""Parameter groups as rows of the kernels' hyperparameter and source tables."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dragon.kernels import table
from dragon.vm.torch.optim._algorithms.algorithm import host_number
from dragon.vm.torch.optim._gradients.scaling import clip_value, group_factor
from dragon.vm.torch.optim._options import Group, Settings, Version
from dragon.vm.torch.optim._table.table import DeviceTable, words_of

# Maps a group to an algorithm's own hyperparameters, by the name of their column.
Columns = Callable[[Mapping[str, Any]], dict[str, float]]

# The kernels' constants as integers: each conversion calls Python.
_COLUMNS = {name: int(value) for name, value in vars(table).items() if isinstance(value, tl.constexpr)}
_LR = _COLUMNS["LR"]
_N_COLUMNS, _N_SOURCES = _COLUMNS["GROUP_COLUMNS"], _COLUMNS["SOURCE_COLUMNS"]
_SOURCES = [_COLUMNS[name] for name in ("LR_SOURCE", "BETA1_SOURCE", "BETA2_SOURCE")]


class GroupTable:
    """The sections "groups" and "sources" of a table, and what they were written for.

    Attributes:
        clips_each: whether some group clips each gradient by its own norm.
        is_live: whether steps may be captured.
    """

    def __init__(
        self, device_table: DeviceTable, device: torch.device, columns_of: Columns, settings: Settings
    ) -> None:
        self._table, self._device, self._columns_of, self._settings = device_table, device, columns_of, settings
        self._rows: list[list[float]] = []
        self._sources: list[list[int]] = []
        self._written_for: Version | None = None
        self.clips_each = self.is_live = False

    def write(self, groups: Sequence[Group], version: Version) -> None:
        """Write the hyperparameters, if they are of another version than those written last.

        Raises:
            ValueError: for a hyperparameter on a device that kernels cannot read.
        """
        written_for, self._written_for = self._written_for, None
        if written_for is None or written_for[0] != version[0]:
            rows = list(map(self._row_of, groups))
            self.write_rows(rows, [_source_row(group, self._device) for group in groups])
            self.clips_each = any(group["clip_norm"] for group in groups)
            self.is_live = any(group["capturable"] for group in groups)
        elif written_for != version:
            rows, self._rows = self._rows, []
            rates = array("d", [float(group["lr"]) for group in groups])
            self._table.write("groups", words_of(rates), _LR, _N_COLUMNS)
            for row, rate in zip(rows, rates, strict=True):
                row[_LR] = rate
            self._rows = rows
        self._written_for = version

    def write_one(self, index: int, group: Group) -> bool:
        """Write the hyperparameters of one group between steps; False if none were written yet."""
        if index >= len(self._rows):
            return False
        rows, sources = list(self._rows), list(self._sources)
        rows[index] = self._row_of(group)
        sources[index] = _source_row(group, self._device)
        # Not those of the last step any more.
        self._written_for = None
        self.write_rows(rows, sources)
        return True

    def _row_of(self, group: Group) -> list[float]:
        """A group's row of the hyperparameter table; tensors on a device stand in the source table instead."""
        row = [0.0] * _N_COLUMNS
        columns = {
            "LR": host_number(group["lr"]),
            "WEIGHT_DECAY": float(group["weight_decay"]),
            "GRAD_FACTOR": group_factor(group),
            "CLIP_VALUE": clip_value(group),
            "CLIP_NORM": float(group["clip_norm"]),
            "MAX_GRAD_NORM": float(self._settings.max_grad_norm),
            "EMA_DECAY": float(group["ema_decay"]),
            "SKIP_NONFINITE": float(self._settings.skip_nonfinite),
            **self._columns_of(group),
        }
        for name, value in columns.items():
            row[_COLUMNS[name]] = value
        return row

    def write_rows(self, rows: list[list[float]], sources: list[list[int]]) -> bool:
        """Write rows of both sections, as far as they differ from those written last; tell whether groups do."""
        differ = rows != self._rows
        if differ:
            self._rows = []
            self._table.write("groups", words_of(array("d", chain.from_iterable(rows))))
            self._rows = rows
        if sources != self._sources:
            self._sources = []
            self._table.write("sources", array("q", chain.from_iterable(sources)))
            self._sources = sources
        return differ


def _source_row(group: Group, device: torch.device) -> list[int]:
    """Addresses of a group's hyperparameters that are tensors on the device, 0 for the others.

    Raises:
        ValueError: for a tensor of another device or dtype than the kernels can read.
    """
    row = [0] * _N_SOURCES
    values = [("lr", group["lr"]), *(("betas", beta) for beta in group.get("betas", ()))]
    for column, (key, value) in zip(_SOURCES, values, strict=False):
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            continue
        if value.device != device or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{key} must be a number, or a float32 or float64 tensor on {device} or the CPU, "
                f"but got {value.dtype} on {value.device}"
            )
        row[column] = value.data_ptr() | (value.dtype == torch.float64)
    return row
