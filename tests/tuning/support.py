"""A machine to tune on that is not there: its clock, and kernels with planted times."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dragon.kernels.config import LaunchConfig
from dragon.kernels.spec import Spec
from dragon.vm.measuring.machine import INTERPRETER
from dragon.vm.torch.optim._backends.configs import SCHEMA, kernel_hash, spec_fields
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.run import Tools

DEFAULT = LaunchConfig()
SPEC = Spec("adam", "float32", "float32", ("float32", "float32"))
MACHINE = INTERPRETER._replace(name="Planted GPU", arch="sm_90")
JOB = Job("adam fp32", SPEC, "small", (100, 33))


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


def planted_tools(
    bench: Callable[[Job], Any], clock: Clock | None = None, pruned: dict[LaunchConfig, str] | None = None
) -> Tools:
    """Tools with a bench and a clock of the test's own; the compiler is against what is in `pruned`."""
    verdicts = pruned or {}

    def prune(spec: Spec, configs: Sequence[LaunchConfig], seconds: float) -> dict[LaunchConfig, str | None]:
        return {config: verdicts.get(config) for config in configs}

    return Tools(bench, prune, clock or Clock())


def result(config: LaunchConfig = DEFAULT, **changes: Any) -> dict[str, Any]:
    """A result of today's kernels, as it is stored."""
    times = {"median": 1.0, "p20": 0.9, "p80": 1.1, "n": 41}
    return {
        "schema": SCHEMA,
        "kernel": "adam fp32",
        "spec": spec_fields(SPEC),
        "size": "small",
        "arch": "sm_90",
        "device": "Planted GPU",
        "config": asdict(config),
        "reason": "+10.0% against the default, noise 1.0%, 41 pairs",
        "kernel_hash": kernel_hash(),
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-01T00:00:00+00:00",
        "best_ms": times,
        "default_ms": times,
        "copy_ms": 0.8,
        "nbytes": 2**20,
        "trials": [],
        **changes,
    }
