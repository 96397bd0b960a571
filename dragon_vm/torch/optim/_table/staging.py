"""Pinned host memory for copies to a device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from dragon.vm.torch.optim._modes import with_plain_tensors

# What graphs read. It is never freed: a graph may outlive its optimizer, and PyTorch would record an event on the
# stream of the capture, which may be capturing again. Nobody can query such an event; on devices this is
# https://github.com/pytorch/pytorch/issues/193982.
_captured: list[Tensor] = []


class StagingRing:
    """Pinned host buffers for copies to the device, each reused only once its last copy is done.

    A busy buffer is never waited for: there will be more of them. A captured copy reads its buffer at every
    replay, so it gets one that is never used again. It comes from a reserve, since not every PyTorch allocates
    pinned memory within a capture.
    """

    def __init__(self) -> None:
        # By their length, of which a table has few; those in turn first that were used longest ago.
        self._slots: dict[int, deque[tuple[Tensor, torch.Event]]] = {}
        self._reserve: list[Tensor] = []

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy int64 `source` on the CPU to `target` of the same length on a CUDA device, in stream order."""
        slots = self._slots.setdefault(len(source), deque())
        if slots and slots[0][1].query():
            slots.rotate(-1)
        else:
            slots.append((_new_buffer(len(source)), torch.Event(target.device)))
        staging, event = slots[-1]
        _copy_to_device(staging.copy_(source), target)
        event.record()

    def expect_capture(self, length: int) -> None:
        """Keep a buffer of `length` words in reserve for a copy within a capture."""
        if not self._reserve:
            self._reserve.append(_new_buffer(length))

    def copy_captured(self, source: Tensor, target: Tensor) -> None:
        """`copy` within a capture: each replay copies what `source` holds now."""
        _captured.append(self._reserve.pop() if self._reserve else _new_buffer(len(source)))
        _copy_to_device(_captured[-1].copy_(source), target)


def _new_buffer(length: int) -> Tensor:
    return with_plain_tensors(lambda: torch.empty(length, dtype=torch.int64, device="cpu", pin_memory=True))


def _copy_to_device(staging: Tensor, target: Tensor) -> None:
    target.copy_(staging, non_blocking=True)
