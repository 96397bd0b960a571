"""Device memory of a flattened group: one buffer, mirrored on the host, uploaded in at most one copy a step."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

# Words of the smallest staging buffer; the others are twice, four times, ... as long.
_SLOT = 64


class StagingRing:
    """Pinned host buffers for copies to the device, each reused only once its last copy is done.

    A busy buffer is never waited for: there will be more of them. A captured copy reads its buffer at every
    replay, so it gets one that is never used again. Within a capture no event may be asked for its state; there
    that buffer comes from what is kept in reserve, since not every PyTorch allocates pinned memory then.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        # By their length, those in turn first that were used longest ago.
        self._slots: dict[int, deque[tuple[Tensor, torch.cuda.Event]]] = {}
        self._reserve = [self._new_buffer(length)]
        self._captured: list[Tensor] = []

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy int64 `source` on the CPU to `target` of the same length on a CUDA device, in stream order."""
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(self._reserve.pop() if self._reserve else self._new_buffer(self._length))
            _copy_to_device(self._captured[-1][: len(source)].copy_(source), target)
            return
        staging, event = self._free_slot(min(_SLOT << (len(source) // _SLOT).bit_length(), self._length))
        _copy_to_device(staging[: len(source)].copy_(source), target)
        event.record()
        if not self._reserve:
            self._reserve.append(self._new_buffer(self._length))

    def _free_slot(self, length: int) -> tuple[Tensor, torch.cuda.Event]:
        slots = self._slots.setdefault(length, deque())
        if slots and slots[0][1].query():
            slots.rotate(-1)
        else:
            slots.append((self._new_buffer(length), torch.cuda.Event()))
        return slots[-1]

    def _new_buffer(self, length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int64, device="cpu", pin_memory=True)


def _copy_to_device(staging: Tensor, target: Tensor) -> None:
    target.copy_(staging, non_blocking=True)


class DeviceTable:
    """Sections of 64-bit words in one device buffer, with the host's copy of them.

    Args:
        sections: words of each section.
        device: where the buffer lives.
    """

    def __init__(self, sections: Sequence[array[int]], device: torch.device) -> None:
        self._bounds = [0]
        self._host = array("q")
        for section in sections:
            self._host.extend(section)
            # Kernels read sections as 16-byte aligned pointers.
            if len(self._host) % 2:
                self._host.append(0)
            self._bounds.append(len(self._host))
        self._ring = StagingRing(len(self._host)) if device.type == "cuda" else None
        self._place(device)

    def _place(self, device: torch.device) -> None:
        self._words = torch.frombuffer(self._host, dtype=torch.int64) if self._host else torch.empty(0)
        self._buffer = torch.empty(len(self._host), dtype=torch.int64, device=device)
        self._changed = (0, len(self._host))
        self.n_uploads = 0

    def twin(self) -> DeviceTable:
        """A table of the same words in memory of its own, none of them uploaded yet; it shares the ring."""
        twin = copy(self)
        twin._host = self._host[:]
        twin._place(self._buffer.device)
        return twin

    def section(self, index: int, dtype: torch.dtype) -> Tensor:
        """The device's copy of a section, seen as another dtype."""
        return self._buffer[self._bounds[index] : self._bounds[index + 1]].view(dtype)

    def write(self, index: int, words: array[int]) -> None:
        """Change the first words of a section on the host."""
        low = self._bounds[index]
        high = low + len(words)
        self._mark(low, high)
        self._host[low:high] = words

    def write_column(self, index: int, values: Tensor, column: int, width: int) -> None:
        """Change one of the `width` columns of a section on the host."""
        low = self._bounds[index] + column
        high = low + (len(values) - 1) * width + 1
        self._mark(low, high)
        self._words[low:high:width] = values

    def _mark(self, low: int, high: int) -> None:
        first, end = self._changed
        self._changed = (min(first, low), max(end, high)) if first < end else (low, high)

    def upload(self) -> None:
        """Copy what changed since the last upload, in one copy, in stream order, without waiting."""
        first, end = self._changed
        if first >= end:
            return
        source, target = self._words[first:end], self._buffer[first:end]
        if self._ring is not None:
            self._ring.copy(source, target)
        else:
            target.copy_(source)
        self._changed = (0, 0)
        self.n_uploads += 1


def words_of(numbers: Sequence[float]) -> array[int]:
    """Float64 numbers as 64-bit words."""
    return array("q", array("d", numbers).tobytes())
