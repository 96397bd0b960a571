"""Times of calls on one device: the timer of tuning and of the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Read before a launch: several times the largest last-level cache of a GPU. Reading takes the device longer than
# the host needs to queue a launch, so that the launch never waits for the host.
FLUSH_NBYTES = 2**29

# An upper bound of what `torch.cuda._sleep` counts in a millisecond.
CYCLES_PER_MS = 2_000_000

HEAD_START_MS = 1.0

Call = Callable[[], object]


class Spread(NamedTuple):
    """Median, 20th and 80th percentile of `n` samples."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3], len(samples))


class Wall(NamedTuple):
    """Milliseconds of one call by the wall clock: until all is done, and until the call returned."""

    total_ms: float
    host_ms: float


class Timer:
    """Times calls on a CPU or on a CUDA or ROCm device.

    Args:
        device: where the calls work.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cpu = device.type == "cpu"
        self._device = device
        if not self.is_cpu:
            free, _ = torch.cuda.mem_get_info(device)
            self._lines = torch.zeros(min(FLUSH_NBYTES, free // 8) // 4, device=device)
            self._sum = torch.zeros((), device=device)

    def flush(self) -> None:
        """Fill the caches of a GPU by reading.

        Lines that are written would be written back within the next launch, at its expense.
        """
        if not self.is_cpu:
            torch.sum(self._lines, dim=0, out=self._sum)

    def synchronize(self) -> None:
        """Wait until the device is done."""
        if not self.is_cpu:
            torch.cuda.synchronize(self._device)

    def wall_ms(self, call: Call, cold: bool = True) -> Wall:
        """Time one call by the wall clock; `cold` flushes a GPU's caches before it."""
        if cold:
            self.flush()
        self.synchronize()
        start = time.perf_counter_ns()
        call()
        returned = time.perf_counter_ns()
        self.synchronize()
        done = time.perf_counter_ns()
        return Wall((done - start) / 1e6, (returned - start) / 1e6)

    def device_ms(self, calls: Sequence[Call], host_ms: float = 0.0) -> list[float]:
        """Device time of each call, run one after another with flushed caches; waits once, at the end.

        Args:
            calls: what to time.
            host_ms: how long the host takes to queue a call, if that is longer than a flush.
        """
        if self.is_cpu:
            return [self.wall_ms(call).total_ms for call in calls]
        with torch.cuda.device(self._device):
            pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
            # The host gets ahead of the device, or the first call would begin when it is launched.
            torch.cuda._sleep(int(HEAD_START_MS * CYCLES_PER_MS))
            for call, (start, end) in zip(calls, pairs, strict=True):
                if host_ms:
                    torch.cuda._sleep(int((2 * host_ms + 0.1) * CYCLES_PER_MS))
                self.flush()
                start.record()
                call()
                end.record()
            self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]
