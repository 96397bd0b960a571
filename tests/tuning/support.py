"""A machine to tune on that is not there: its clock, its compiler, and kernels with planted times."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant
from dragon.vm.tuning.identity import kernel_hash
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.machine import Machine
from dragon.vm.tuning.ranking import Facts
from dragon.vm.tuning.record import MEASURED, Record, Summary, Times, Trial
from dragon.vm.tuning.scratch import Processor
from dragon.vm.tuning.search import Standing
from dragon.vm.tuning.sizes import Case

DEFAULT = LaunchConfig()
VARIANT = Variant("adam", 2, "float32", "float32", "float32")
MACHINE = Machine(torch.device("cpu"), "Planted GPU", "sm_90", Processor())
JOB = Job("adam fp32", VARIANT, Case("tiny", "small", (100, 33)))

GOOD = Facts(64, 0, 0, True, 128, 30.0)


@dataclass
class Clock:
    """Seconds that pass only where a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class PlantedBench:
    """A bench whose kernels take planted times, with noise.

    Attributes:
        time_of: true milliseconds of a configuration.
        noise: standard deviation, as a share of the time.
        wrong: configurations that give a wrong result.
        clock: advanced by every launch and check.
        check_seconds: of a check.
        launch_seconds: of a timed launch.
        interrupt_at: number of the repetition in which the user presses Ctrl-C.
    """

    time_of: Callable[[LaunchConfig], float]
    noise: float = 0.0
    wrong: frozenset[LaunchConfig] = frozenset()
    clock: Clock = field(default_factory=Clock)
    check_seconds: float = 0.0
    launch_seconds: float = 0.0
    interrupt_at: int | None = None
    seed: int = 0
    nbytes: int = 2**20

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.n_repetitions = 0
        self.timed: set[LaunchConfig] = set()

    def check(self, config: LaunchConfig) -> str | None:
        self.clock.now += self.check_seconds
        return "planted" if config in self.wrong else None

    def time_ms(self, configs: Sequence[LaunchConfig]) -> list[float]:
        self.n_repetitions += 1
        if self.n_repetitions == self.interrupt_at:
            raise KeyboardInterrupt
        self.timed.update(configs)
        self.clock.now += self.launch_seconds * len(configs)
        # The machine slows down and recovers: what all share must not decide.
        drift = 1 + 0.3 * self._random.random()
        return [drift * self.time_of(c) * max(self._random.gauss(1, self.noise), 0.1) for c in configs]

    def copy_ms(self) -> float:
        return 0.5


@dataclass
class PlantedCompiler:
    """A compiler that makes the same of everything, but where a test says otherwise."""

    facts: dict[LaunchConfig, Facts | str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.compiled: list[LaunchConfig] = []

    def compile(
        self, variant: Variant, configs: Sequence[LaunchConfig], arch: str
    ) -> Iterator[tuple[LaunchConfig, Facts | str]]:
        for config in configs:
            self.clock.now += self.seconds
            self.compiled.append(config)
            yield config, self.facts.get(config, GOOD)


class Diary:
    """A listener that writes everything down."""

    def __init__(self) -> None:
        self.ended: list[tuple[Job, Record | None, str]] = []
        self.standings: list[Standing] = []

    def job_started(self, job: Job, index: int, n_jobs: int) -> None:
        assert 0 <= index < n_jobs

    def progressed(self, standing: Standing) -> None:
        self.standings.append(standing)

    def job_ended(self, job: Job, record: Record | None, note: str) -> None:
        self.ended.append((job, record, note))


def summary(ms: float = 1.0) -> Summary:
    return Summary(ms, 0.9 * ms, 1.1 * ms, 41)


def record(config: LaunchConfig = DEFAULT, **changes: object) -> Record:
    """A measured result of today's kernels."""
    fields: dict[str, object] = {
        "basis": MEASURED,
        "arch": "sm_90",
        "device": "Planted GPU",
        "variant": VARIANT,
        "size": "small",
        "case": "small",
        "config": config,
        "reason": "+10.0% against the default, noise 1.0%, 41 pairs",
        "kernel_hash": kernel_hash("adam"),
        "versions": {"torch": "2.13.0", "triton": "3.7.1"},
        "date": "2026-01-01T00:00:00+00:00",
        "times": Times(summary(0.9), summary(1.0), 0.1, 0.01, 0.8, 2**20),
        "trials": (Trial(config, "winner", summary(0.9)), Trial(LaunchConfig(chunk=8192), "spills")),
    }
    return Record(**{**fields, **changes})
