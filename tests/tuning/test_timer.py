"""Device times are of the launch alone: more bytes take longer, and a busy host does not count."""

import time

import pytest
import torch

from dragon.kernels.inspect import UPDATES
from dragon.vm.tuning import commands, store
from dragon.vm.tuning.compiler import Workers
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.machine import present_gpu
from dragon.vm.tuning.run import TuningRun
from dragon.vm.tuning.sizes import Case
from dragon.vm.tuning.statistics import median
from dragon.vm.tuning.timer import DeviceTimer

from .support import Diary

pytestmark = pytest.mark.gpu


def test_eight_times_the_bytes_take_several_times_as_long(device: torch.device) -> None:
    timer = DeviceTimer(torch.device(device.type, 0))
    small, large = (torch.zeros(n, dtype=torch.int8, device=device) for n in (2**25, 2**28))
    times = [timer.time_ms([small.clone, large.clone]) for _ in range(9)]
    ratio = median([large_ms / small_ms for small_ms, large_ms in times])
    assert 3 < ratio < 20


def test_the_hosts_time_in_front_of_a_launch_does_not_count(device: torch.device) -> None:
    timer = DeviceTimer(torch.device(device.type, 0))
    value = torch.zeros(2**20, device=device)

    def add() -> None:
        value.add_(1)

    add()
    plain = median(timer.time_ms([add] * 21))

    def dawdle_and_add() -> None:
        end = time.perf_counter() + 2e-5
        while time.perf_counter() < end:
            pass
        value.add_(1)

    assert median(timer.time_ms([dawdle_and_add] * 21)) < 2 * plain + 0.02


def test_a_short_run_on_this_gpu_stores_a_sound_result() -> None:
    machine = present_gpu()
    assert machine is not None
    diary = Diary()
    job = Job("adam fp32", UPDATES["adam fp32"], Case("test", "small", (2**22,)))
    with Workers() as workers:
        tools = commands.device_tools(machine, workers)
        start = time.monotonic()
        assert TuningRun(machine, tools, diary).run([job], 40.0)
    assert time.monotonic() - start <= 44.0
    record = diary.ended[0][1]
    assert record is not None, diary.ended[0][2]
    assert record.times is not None
    # A kernel that moves as many bytes as a copy is no faster, but for what the caches and clocks make of it.
    assert 0.2 < record.times.share_of_copy < 1.2
    assert not [trial for trial in record.trials if trial.outcome.startswith("wrong")]
    assert store.scan()[0][0][1] == record
