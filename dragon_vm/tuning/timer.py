"""Time launches on the device, without the host's share and without what the caches still hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

# Cleared before each launch: several times the largest last-level cache of a GPU. Clearing takes the device longer
# than the host needs to enqueue the launch, so that the launch never waits for the host.
FLUSH_NBYTES = 2**29


class Timer(Protocol):
    """Anything that times launches."""

    def time_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        """Device time of each launch, run one after another, in milliseconds."""
        ...


class DeviceTimer:
    """A timer of events on a CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free, _ = torch.cuda.mem_get_info(device)
        self._flush = torch.empty(min(FLUSH_NBYTES, free // 8), dtype=torch.int8, device=device)

    def time_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        """Device time of each launch, run one after another, in milliseconds; waits once, at the end."""
        with torch.cuda.device(self._device):
            pairs = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in launches
            ]
            for launch, (start, end) in zip(launches, pairs, strict=True):
                self._flush.zero_()
                start.record()
                launch()
                end.record()
            torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in pairs]
