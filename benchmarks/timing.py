"""Contenders take turns, A B C A B C ..., so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# A turn is as many steps as take the reference this long. Where those are several, one more goes before them: it
# fills the caches after the turns of others. On a CPU that makes a difference, which must not be up to chance: no
# case has steps that take about half as long.
TURN_MS = 40.0
MOST_STEPS = 20

# Every contender gets this many turns, however slow; after them it drops out when its share of time is used up.
FEWEST_ROUNDS = 3

# A GPU that waits this many times as long as the host takes has all work of a turn queued before it starts.
QUEUE_FACTOR = 2.0
CYCLES_PER_MS = 2_000_000


class Turn(NamedTuple):
    """Milliseconds a step in one turn.

    Attributes:
        total_ms: until all is done, host and device together.
        host_ms: until the Python call returned; None on the CPU, where that is the total.
        device_ms: of the device, with all launches queued before it began; None on the CPU.
        cold_ms: of the first step, when the caches were full of what others use; None on a GPU.
    """

    total_ms: float
    host_ms: float | None = None
    device_ms: float | None = None
    cold_ms: float | None = None


class Spread(NamedTuple):
    """What is reported of some samples."""

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


@dataclass
class Entry:
    """Somebody who takes turns.

    Attributes:
        name: unique among those that take turns together.
        step: what is measured.
        before_step: called before each step, outside of the time.
        context: in force during a turn.
        turns: by round; None for a round that was sat out.
    """

    name: str
    step: Callable[[], object]
    before_step: Callable[[], object] = lambda: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    turns: list[Turn | None] = field(default_factory=list)

    def samples(self, clock: str) -> list[float]:
        """What one clock showed in each turn; empty if that clock does not run here."""
        return [value for turn in self.turns if turn and (value := getattr(turn, clock)) is not None]

    def ratios_to(self, reference: Entry, clock: str = "total_ms") -> list[float]:
        """How many times as long as this entry the reference took, round by round."""
        return [
            getattr(theirs, clock) / getattr(own, clock)
            for own, theirs in zip(self.turns, reference.turns, strict=True)
            if own and theirs
        ]


def take_turns(
    entries: Sequence[Entry],
    reference: Entry,
    device: torch.device,
    n_rounds: int,
    budget_s: float,
    on_turn: Callable[[], object] = lambda: None,
) -> None:
    """Measure every entry in every round, and append to its turns.

    Args:
        entries: who takes turns, warmed up.
        reference: the one whose speed sets the length of a turn.
        device: of the tensors.
        n_rounds: at most; an entry drops out earlier once it has used up its time.
        budget_s: seconds for each entry.
        on_turn: called after each turn, taken or sat out.
    """
    turn = _cpu_turn if device.type == "cpu" else _cuda_turn
    with reference.context():
        reference_ms = min(turn(reference, 1).total_ms for _ in range(3))
    n_steps = max(1, min(MOST_STEPS, int(TURN_MS / reference_ms)))
    spent = {entry.name: 0.0 for entry in entries}
    gc.collect()
    gc.disable()
    try:
        for index in range(n_rounds):
            for entry in entries:
                used_up = index >= FEWEST_ROUNDS and spent[entry.name] > budget_s
                start = time.perf_counter()
                with entry.context():
                    entry.turns.append(None if used_up else turn(entry, n_steps))
                spent[entry.name] += time.perf_counter() - start
                on_turn()
    finally:
        gc.enable()


def _cpu_turn(entry: Entry, n_steps: int) -> Turn:
    times = []
    for _ in range(n_steps + (n_steps > 1)):
        entry.before_step()
        start = time.perf_counter_ns()
        entry.step()
        times.append(time.perf_counter_ns() - start)
    return Turn(statistics.median(times[1:] or times) / 1e6, cold_ms=times[0] / 1e6)


def _cuda_turn(entry: Entry, n_steps: int) -> Turn:
    if n_steps > 1:
        entry.before_step()
        entry.step()
    host_ms = _cuda_host_ms(entry, n_steps)
    return Turn(_cuda_total_ms(entry, n_steps), host_ms, _cuda_device_ms(entry, host_ms))


def _cuda_host_ms(entry: Entry, n_steps: int) -> float:
    times = []
    for _ in range(n_steps):
        entry.before_step()
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        entry.step()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e6


def _cuda_total_ms(entry: Entry, n_steps: int) -> float:
    """Steps one after another with a synchronisation at the end; what comes before a step is not subtracted."""
    entry.before_step()
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(n_steps):
        entry.step()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e6 / n_steps


def _cuda_device_ms(entry: Entry, host_ms: float) -> float:
    """One step between two events, behind a kernel that waits until the host has queued it all."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    entry.before_step()
    torch.cuda._sleep(int((QUEUE_FACTOR * host_ms + 0.1) * CYCLES_PER_MS))
    start.record()
    entry.step()
    end.record()
    torch.cuda.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed
