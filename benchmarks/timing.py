"""Contenders take turns in random order, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dragon.vm.measuring.timer import Timer

# Warm steps follow the cold one of a turn for as long as the reference takes them in this time.
WARM_MS = 20.0
MOST_WARM = 5

# Every contender gets this many turns, however slow; after them it drops out when its share of time is used up.
FEWEST_ROUNDS = 3


class Turn(NamedTuple):
    """Milliseconds of one turn.

    Attributes:
        cold_ms: the first step, until all is done; the caches are full of other contenders' tensors, or flushed.
        host_ms: of that, until the Python call returned; None on the CPU.
        device_ms: of the device, flushed, with all launches queued before it began; None on the CPU.
        warm_ms: the median of the steps that follow; None if there are none.
    """

    cold_ms: float
    host_ms: float | None = None
    device_ms: float | None = None
    warm_ms: float | None = None


@dataclass
class Entry:
    """A contender that takes turns.

    Attributes:
        name: unique among those that take turns together.
        step: what is measured.
        before_step: called before each step, outside of the time.
        turns: by round; None for a round that was sat out.
    """

    name: str
    step: Callable[[], object]
    before_step: Callable[[], object] = lambda: None
    turns: list[Turn | None] = field(default_factory=list)

    def samples(self, clock: str) -> list[float]:
        """The readings of one clock in each turn; empty if that clock does not run here."""
        return [value for turn in self.turns if turn and (value := getattr(turn, clock)) is not None]

    def ratios_to(self, reference: Entry) -> list[float]:
        """How many times as long as this entry's cold step the reference's took, round by round."""
        return [
            theirs.cold_ms / own.cold_ms
            for own, theirs in zip(self.turns, reference.turns, strict=True)
            if own and theirs
        ]


def take_turns(
    entries: Sequence[Entry],
    reference: Entry,
    timer: Timer,
    n_rounds: int,
    budget_s: float,
    on_round: Callable[[int], object] = lambda n_done: None,
) -> None:
    """Measure every entry in every round, and append to its turns.

    Args:
        entries: who takes turns, warmed up.
        reference: the one whose speed sets the number of warm steps.
        timer: of the device.
        n_rounds: at most; an entry drops out earlier once it has used up its time.
        budget_s: seconds for each entry.
        on_round: called after each round with the number of rounds that are done.
    """
    reference_ms = min(take_turn(reference, timer, 0).cold_ms for _ in range(3))
    n_warm = min(MOST_WARM, int(WARM_MS / reference_ms))
    spent = {entry.name: 0.0 for entry in entries}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for index in range(n_rounds):
            for entry in order.sample(entries, len(entries)):
                used_up = index >= FEWEST_ROUNDS and spent[entry.name] > budget_s
                start = time.perf_counter()
                entry.turns.append(None if used_up else take_turn(entry, timer, n_warm))
                spent[entry.name] += time.perf_counter() - start
            on_round(index + 1)
            if index + 1 >= FEWEST_ROUNDS and all(seconds > budget_s for seconds in spent.values()):
                break
    finally:
        gc.enable()


def take_turn(entry: Entry, timer: Timer, n_warm: int) -> Turn:
    """A cold step, on a GPU another by the device's clock, and some warm ones."""
    entry.before_step()
    cold = timer.wall_ms(entry.step)
    host_ms = device_ms = None
    if not timer.is_cpu:
        host_ms = cold.host_ms
        entry.before_step()
        (device_ms,) = timer.device_ms([entry.step], host_ms)
    warm = []
    for _ in range(n_warm):
        entry.before_step()
        warm.append(timer.wall_ms(entry.step, cold=False).total_ms)
    return Turn(cold.total_ms, host_ms, device_ms, statistics.median(warm) if warm else None)
