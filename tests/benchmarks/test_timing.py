"""Contenders take turns, fairly, and what is reported of them is what was measured."""

import gc
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import timing
from benchmarks.timing import Entry, Spread, Turn, take_turns

CPU = torch.device("cpu")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_spread_is_in_order_and_within_its_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)
    # Percentiles are interpolated, which rounds.
    bounds = [min(samples), spread.p20, spread.median, spread.p80, max(samples)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(bounds))
    assert spread.n == len(samples)


def test_a_spread_has_the_percentiles_that_it_says() -> None:
    assert Spread.of(list(map(float, range(11)))) == (5, 2, 8, 11)


def test_turns_are_interleaved_and_steps_are_prepared_outside_of_the_time() -> None:
    log: list[str] = []

    def entry(name: str) -> Entry:
        return Entry(name, lambda: log.append(name), lambda: (log.append(f"before {name}"), time.sleep(0.002)))

    entries = [entry("a"), entry("b")]
    take_turns(entries, entries[0], CPU, n_rounds=4, budget_s=10)
    steps = [line for line in log if not line.startswith("before")]
    turns = [name for name, previous in zip(steps, ["", *steps], strict=False) if name != previous]
    assert turns[:1] == ["a"]
    assert "".join(turns) in ("abababab", "aabababab")
    assert all(before == f"before {name}" for before, name in zip(log[::2], log[1::2], strict=True))
    assert [len(e.turns) for e in entries] == [4, 4]
    assert max(turn.total_ms for e in entries for turn in e.turns) < 2


def test_a_slow_entry_drops_out_after_its_share_but_not_before_a_few_turns() -> None:
    slow, fast = Entry("slow", lambda: time.sleep(0.02)), Entry("fast", lambda: None)
    take_turns([slow, fast], slow, CPU, n_rounds=8, budget_s=0.03)
    assert [turn is not None for turn in slow.turns] == [True] * timing.FEWEST_ROUNDS + [False] * 5
    assert None not in fast.turns
    assert len(slow.samples("total_ms")) == timing.FEWEST_ROUNDS
    assert len(fast.ratios_to(slow)) == timing.FEWEST_ROUNDS
    assert min(slow.samples("total_ms")) >= 20


@pytest.mark.parametrize(("n_steps", "n_taken"), [(1, 1), (2, 3), (5, 6)])
def test_the_first_of_several_steps_is_cold_and_does_not_count(n_steps: int, n_taken: int) -> None:
    pauses = [0.03]
    taken = []

    def step() -> None:
        taken.append(1)
        time.sleep(pauses.pop() if pauses else 0)

    turn = timing._cpu_turn(Entry("slow at first", step), n_steps)
    assert len(taken) == n_taken
    assert turn.cold_ms is not None
    assert turn.cold_ms >= 30
    assert (turn.total_ms == turn.cold_ms) is (n_steps == 1)
    assert (turn.total_ms < 20) is (n_steps > 1)


def test_ratios_are_taken_round_by_round() -> None:
    ours = Entry("ours", lambda: None, turns=[Turn(1.0), Turn(10.0), None])
    reference = Entry("reference", lambda: None, turns=[Turn(3.0), Turn(30.0), Turn(1.0)])
    assert ours.ratios_to(reference) == [3.0, 3.0]
    assert ours.samples("device_ms") == []


def test_an_entry_is_measured_in_its_context() -> None:
    depth = 0

    class Context:
        def __enter__(self) -> None:
            nonlocal depth
            depth += 1

        def __exit__(self, *args: object) -> None:
            nonlocal depth
            depth -= 1

    seen: list[int] = []
    inside = Entry("inside", lambda: seen.append(depth), context=Context)
    outside = Entry("outside", lambda: seen.append(10 + depth))
    take_turns([inside, outside], inside, CPU, n_rounds=2, budget_s=1)
    assert set(seen) == {1, 10}
    assert depth == 0


def test_garbage_is_collected_again_after_a_failure() -> None:
    def fail() -> None:
        if failing:
            raise RuntimeError("planted")

    failing = False
    broken, fine = Entry("broken", fail), Entry("fine", lambda: None)
    failing = True
    with pytest.raises(RuntimeError, match="planted"):
        take_turns([broken], fine, CPU, n_rounds=1, budget_s=1)
    assert gc.isenabled()


def test_a_gpu_has_its_launches_queued_before_its_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: object) -> float:
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep" if cycles > 0 else "no sleep"))
    entry = Entry("e", lambda: log.append("step"), lambda: log.append("before"))
    turn = timing._cuda_turn(entry, 2)
    warm = ["before", "step"]
    host = ["before", "synchronize", "step"] * 2
    total = ["before", "synchronize", "step", "step", "synchronize"]
    device = ["before", "sleep", "record", "step", "record", "synchronize"]
    assert log == [*warm, *host, *total, *device]
    assert turn.device_ms == 0.25
    assert turn.host_ms is not None
    assert turn.host_ms < 1


@pytest.mark.gpu
def test_the_clocks_of_a_gpu_agree_on_a_long_copy() -> None:
    device = torch.device("cuda")
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = source.clone()
    entry = Entry("copy", lambda: target.copy_(source))
    take_turns([entry], entry, device, n_rounds=5, budget_s=2)
    total, host, of_device = (Spread.of(entry.samples(clock)).median for clock in Turn._fields)
    assert host < of_device
    assert 0.5 < of_device / total < 1.5
