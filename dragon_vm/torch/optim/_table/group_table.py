"""The hyperparameters of all groups in the table of a device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from dragon.vm.torch.optim._options import Settings, Version
from dragon.vm.torch.optim._table.rows import Columns, group_row, source_row, write_rates
from dragon.vm.torch.optim._table.table import DeviceTable, words_of

Group = dict[str, Any]


class GroupTable:
    """The sections "groups" and "sources" of a table, and what they were written for.

    Attributes:
        clips_each: whether some group clips each gradient by its own norm.
        is_live: whether steps may be captured.
    """

    def __init__(self, table: DeviceTable, device: torch.device, columns_of: Columns) -> None:
        self._table, self._device, self._columns_of = table, device, columns_of
        self._rows: list[list[float]] = []
        self._sources: list[list[int]] = []
        self._written_for: tuple[Version, Settings] | None = None
        self.clips_each = self.is_live = False

    def write(self, groups: Sequence[Group], version: Version, settings: Settings) -> None:
        """Write the hyperparameters, if they are of another version than those written last.

        Raises:
            ValueError: for a hyperparameter on a device that kernels cannot read.
        """
        written_for, self._written_for = self._written_for, None
        if written_for is None or (written_for[0][0], written_for[1]) != (version[0], settings):
            rows = [group_row(group, self._columns_of, settings) for group in groups]
            self.write_rows(rows, [source_row(group, self._device) for group in groups])
            self.clips_each = any(group["clip_norm"] for group in groups)
            self.is_live = any(group["capturable"] for group in groups)
        elif written_for[0] != version:
            rows, self._rows = self._rows, []
            write_rates(self._table, rows, [float(group["lr"]) for group in groups])
            self._rows = rows
        self._written_for = (version, settings)

    def write_one(self, index: int, group: Group, settings: Settings) -> bool:
        """Write the hyperparameters of one group between steps; False if none were written yet."""
        if index >= len(self._rows):
            return False
        rows, sources = list(self._rows), list(self._sources)
        rows[index], sources[index] = group_row(group, self._columns_of, settings), source_row(group, self._device)
        # Not those of the last step any more.
        self._written_for = None
        self.write_rows(rows, sources)
        return True

    def write_rows(self, rows: list[list[float]], sources: list[list[int]]) -> None:
        """Write rows of both sections, as far as they differ from those written last."""
        if rows != self._rows:
            self._rows = []
            self._table.write("groups", words_of(list(chain.from_iterable(rows))))
            self._rows = rows
        if sources != self._sources:
            self._sources = []
            self._table.write("sources", array("q", chain.from_iterable(sources)))
            self._sources = sources

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written yet."""
        return not self._rows
