"""Contenders take turns, fairly, and what is reported of them is what was measured."""

import gc
import time
from collections import Counter

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Entry, Turn, take_turn, take_turns
from dragon.vm.measuring.timer import Spread, Timer

CPU = Timer(torch.device("cpu"))


def test_turns_are_interleaved_in_random_order_and_steps_are_prepared_outside_of_the_time() -> None:
    log: list[str] = []

    def entry(name: str) -> Entry:
        return Entry(name, lambda: log.append(name), lambda: (log.append(f"before {name}"), time.sleep(0.002)))

    entries = [entry(name) for name in "abc"]
    take_turns(entries, entries[0], CPU, n_rounds=6, budget_s=10)
    assert log[::2] == [f"before {name}" for name in log[1::2]]
    n_steps = 1 + timing.MOST_WARM
    turns = log[2 * 3 + 1 :: 2][::n_steps]
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert [Counter(names) for names in rounds] == [Counter("abc")] * 6
    assert len(set(map(tuple, rounds))) > 1
    for one in entries:
        assert len(one.samples("cold_ms")) == 6
        assert max(one.samples("cold_ms") + one.samples("warm_ms")) < 2


def test_a_slow_entry_drops_out_after_its_share_but_not_before_a_few_turns() -> None:
    slow, fast = Entry("slow", lambda: time.sleep(0.02)), Entry("fast", lambda: None)
    take_turns([slow, fast], slow, CPU, n_rounds=8, budget_s=0.03)
    assert [turn is not None for turn in slow.turns] == [True] * timing.FEWEST_ROUNDS + [False] * 5
    assert None not in fast.turns
    assert len(fast.ratios_to(slow)) == timing.FEWEST_ROUNDS
    assert min(slow.samples("cold_ms")) >= 20


def test_rounds_end_when_all_have_used_up_their_time() -> None:
    slow, done = Entry("slow", lambda: time.sleep(0.01)), []
    take_turns([slow], slow, CPU, n_rounds=8, budget_s=0.001, on_round=done.append)
    assert done == [1, 2, 3]


def test_the_first_step_of_a_turn_is_cold_and_the_others_are_warm() -> None:
    pauses = [0.03, 0.0, 0.01, 0.02]
    turn = take_turn(Entry("e", lambda: time.sleep(pauses.pop(0))), CPU, n_warm=3)
    assert turn.cold_ms >= 30
    assert 10 <= turn.warm_ms < 20
    assert take_turn(Entry("e", lambda: None), CPU, n_warm=0).warm_ms is None


def test_ratios_are_of_cold_steps_round_by_round() -> None:
    ours = Entry("ours", lambda: None, turns=[Turn(1.0, warm_ms=9.0), Turn(10.0), None])
    reference = Entry("reference", lambda: None, turns=[Turn(3.0), Turn(30.0), Turn(1.0)])
    assert ours.ratios_to(reference) == [3.0, 3.0]
    assert ours.samples("device_ms") == []


def test_garbage_is_collected_again_after_a_failure() -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        take_turns([Entry("broken", fail)], Entry("fine", lambda: None), CPU, n_rounds=1, budget_s=1)
    assert gc.isenabled()


@pytest.mark.gpu
def test_the_clocks_of_a_gpu_agree_on_a_long_copy() -> None:
    device = torch.device("cuda")
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = source.clone()
    entry = Entry("copy", lambda: target.copy_(source))
    take_turns([entry], entry, Timer(device), n_rounds=5, budget_s=2)
    cold, host, of_device = (Spread.of(entry.samples(clock)).median for clock in Turn._fields[:3])
    assert host < of_device
    assert 0.5 < of_device / cold < 1.5
