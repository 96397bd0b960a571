"""Device times are of the launch alone: more bytes take longer, and a busy host does not count."""

import time
from itertools import pairwise
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.measuring.machine import present_gpu
from dragon.vm.measuring.timer import Spread, Timer
from dragon.vm.tuning import store
from dragon.vm.tuning.jobs import Job, select_specs
from dragon.vm.tuning.run import run, tools_of


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_spread_is_in_order_and_within_its_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)
    # Percentiles are interpolated, which rounds.
    bounds = [min(samples), spread.p20, spread.median, spread.p80, max(samples)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(bounds))
    assert spread.n == len(samples)


def test_a_spread_has_the_percentiles_that_it_says() -> None:
    assert Spread.of(list(map(float, range(11)))) == (5, 2, 8, 11)


def test_a_cpu_is_timed_by_the_wall_clock() -> None:
    timer = Timer(torch.device("cpu"))
    short, long = timer.device_ms([lambda: None, lambda: time.sleep(0.02)])
    assert short < 10 < 20 <= long
    wall = timer.wall_ms(lambda: time.sleep(0.02))
    assert 20 <= wall.host_ms <= wall.total_ms


def test_a_gpu_is_flushed_by_reading_and_has_its_work_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: object) -> float:
            return 0.25

    class Device:
        def __init__(self, device: torch.device) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    zeros, total = torch.zeros, torch.sum
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch, "sum", lambda lines, dim, out: (log.append("read"), total(lines, dim, out=out)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 4096, 0))
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep" if cycles > 0 else "no sleep"))
    timer = Timer(torch.device("cuda"))
    assert timer._lines.nbytes == 4096, "an eighth of what is free"
    launch = ["read", "record", "launch", "record"]
    assert timer.device_ms([lambda: log.append("launch")] * 2) == [0.25, 0.25]
    assert log == ["sleep", *launch, *launch, "wait"]
    log.clear()
    timer.device_ms([lambda: log.append("launch")], host_ms=1.0)
    assert log == ["sleep", "sleep", *launch, "wait"]
    log.clear()
    timer.wall_ms(lambda: log.append("launch"))
    timer.wall_ms(lambda: log.append("launch"), cold=False)
    assert log == ["read", "wait", "launch", "wait", "wait", "launch", "wait"]


@pytest.mark.gpu
def test_eight_times_the_bytes_take_several_times_as_long(device: torch.device) -> None:
    timer = Timer(torch.device(device.type, 0))
    small, large = (torch.zeros(n, dtype=torch.int8, device=device) for n in (2**25, 2**28))
    times = [timer.device_ms([small.clone, large.clone]) for _ in range(9)]
    assert 3 < median(large_ms / small_ms for small_ms, large_ms in times) < 20


@pytest.mark.gpu
def test_the_hosts_time_in_front_of_a_launch_does_not_count(device: torch.device) -> None:
    timer = Timer(torch.device(device.type, 0))
    value = torch.zeros(2**20, device=device)

    def add() -> None:
        value.add_(1)

    def dawdle_and_add() -> None:
        time.sleep(1e-3)
        value.add_(1)

    add()
    plain = median(timer.device_ms([add] * 21))
    assert median(timer.device_ms([dawdle_and_add] * 21, host_ms=2.0)) < 2 * plain + 0.02


@pytest.mark.gpu
def test_a_short_run_on_this_gpu_stores_a_sound_result() -> None:
    machine = present_gpu()
    assert machine is not None
    (spec,) = select_specs(["adam fp32"]).values()
    start = time.monotonic()
    (result,) = run([Job("adam fp32", spec, "small", (2**22,))], 15.0, machine, tools_of(machine), print)
    assert time.monotonic() - start <= 20.0
    # A kernel that moves as many bytes as a copy is no faster, but for what the caches and clocks make of it.
    assert 0.2 < result["copy_ms"] / result["best_ms"]["median"] < 1.2
    assert not [trial for trial in result["trials"] if trial["outcome"].startswith("wrong")]
    assert [found for _, found in store.scan()] == [result]
