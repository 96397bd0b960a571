"""The table of a device: one buffer with all that its launches read, uploaded in at most one copy a step."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._table.staging import StagingRing


class DeviceTable:
    """Sections of 64-bit words in one device buffer, with the host's copy of them.

    Args:
        sections: words of each section by name; those that change at a step stand side by side.
        device: where the buffer lives.

    Attributes:
        n_uploads: host-to-device copies so far.
    """

    def __init__(self, sections: Mapping[str, array[int]], device: torch.device) -> None:
        self._bounds: dict[str, tuple[int, int]] = {}
        self._host = array("q")
        for name, section in sections.items():
            start = len(self._host)
            self._host.extend(section)
            # Kernels read sections as 16-byte aligned pointers.
            if len(self._host) % 2:
                self._host.append(0)
            self._bounds[name] = start, len(self._host)
        self._words = torch.frombuffer(self._host, dtype=torch.int64) if self._host else torch.empty(0)
        self.buffer = torch.empty(len(self._host), dtype=torch.int64, device=device)
        self._ring = StagingRing() if device.type == "cuda" else None
        self._changed = (0, len(self._host))
        # Of the host's words and the device's, what was copied last.
        self._copied: tuple[tuple[int, int], Tensor, Tensor] | None = None
        self.n_uploads = 0

    def section(self, name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        """The device's copy of a section, seen as another dtype."""
        start, end = self._bounds[name]
        return self.buffer[start:end].view(dtype)

    def write(self, name: str, words: array[int], column: int = 0, n_columns: int = 1) -> None:
        """Change the first words of a section on the host, or of a column if the section is a table."""
        low = self._bounds[name][0]
        high = low + len(words) * n_columns
        first, end = self._changed
        self._changed = (min(first, low), max(end, high)) if first < end else (low, high)
        self._host[low + column : high : n_columns] = words

    def upload(self) -> None:
        """Copy what changed since the last upload, in one copy, in stream order, without waiting."""
        first, end = self._changed
        if first >= end:
            return
        if self._copied is None or self._copied[0] != self._changed:
            self._copied = self._changed, self._words[first:end], self.buffer[first:end]
        _, source, target = self._copied
        if self._ring is not None:
            self._ring.copy(source, target)
        else:
            target.copy_(source)
        self._changed = (0, 0)
        self.n_uploads += 1

    @property
    def is_uploaded(self) -> bool:
        """Whether the device has all that the host has."""
        return self._changed[0] >= self._changed[1]

    def expect_capture(self, name: str) -> None:
        """Prepare for `captured_copy` of a section."""
        if self._ring is not None:
            start, end = self._bounds[name]
            self._ring.expect_capture(end - start)

    def captured_copy(self, name: str, words: array[int]) -> Tensor:
        """A copy of a section for the graph that is being captured: it holds these words at each replay."""
        target = torch.empty_like(self.section(name))
        source = torch.zeros(len(target), dtype=torch.int64, device="cpu")
        source[: len(words)] = torch.frombuffer(words, dtype=torch.int64)
        if self._ring is not None:
            self._ring.copy_captured(source, target)
        else:
            target.copy_(source)
        return target


def words_of(numbers: array[Any]) -> array[int]:
    """Float64 numbers, or pairs of 32-bit integers, as 64-bit words."""
    return array("q", numbers.tobytes())
