"""A tuning run: each job is compiled, pruned, searched and stored, within one budget of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import NamedTuple, Protocol

import torch

from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.launch import Variant
from dragon.vm.tuning._fields import RecordError
from dragon.vm.tuning.candidates import compiled_form, distinct, refinements, shapes
from dragon.vm.tuning.compiler import Compiler
from dragon.vm.tuning.identity import arch_key, kernel_hash, versions
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.machine import Machine
from dragon.vm.tuning.ranking import Facts, limits_of, rank
from dragon.vm.tuning.record import MEASURED, Record, Times, Trial
from dragon.vm.tuning.search import SLOWER, WRONG, Bench, Search, SearchResult, Standing
from dragon.vm.tuning.store import path_of, read_result, save

# Of a job's time, for compiling its candidates ahead.
COMPILE_SHARE = 0.15

NOT_COMPILED = "not compiled in time"


class TimedBench(Bench, Protocol):
    """A bench that also knows what its launches move, and how fast a copy of that is."""

    nbytes: int

    def copy_ms(self) -> float:
        """The time of a `copy_` of as many bytes."""
        ...


class Listener(Protocol):
    """Who is told how a run goes."""

    def job_started(self, job: Job, index: int, n_jobs: int) -> None:
        """A job starts."""
        ...

    def progressed(self, standing: Standing) -> None:
        """Something was measured."""
        ...

    def job_ended(self, job: Job, record: Record | None, note: str) -> None:
        """A job is over; without a record nothing is stored, and the note says why."""
        ...


class Tools(NamedTuple):
    """What a run works with; all of it is replaced in tests.

    Attributes:
        compiler: tells facts before anything is timed.
        bench: makes the bench of a job.
        clock: seconds.
    """

    compiler: Compiler
    bench: Callable[[Job], TimedBench]
    clock: Callable[[], float]


class TuningRun:
    """One run over some jobs.

    Args:
        machine: the device.
        tools: what to work with.
        listener: who is told.
        resume: keep finished results, and go on with interrupted ones.
    """

    def __init__(self, machine: Machine, tools: Tools, listener: Listener, resume: bool = False) -> None:
        self._machine, self._tools, self._listener, self._resume = machine, tools, listener, resume
        self._limits = limits_of(machine.arch)
        self._facts: dict[Variant, dict[LaunchConfig, Facts | str]] = {}

    def run(self, jobs: Sequence[Job], budget: float) -> bool:
        """Run the jobs in `budget` seconds, the time that is left shared evenly among those that are left.

        Returns:
            Whether the run came to its end, and was not interrupted.
        """
        clock = self._tools.clock
        end = clock() + budget
        for index, job in enumerate(jobs):
            self._listener.job_started(job, index, len(jobs))
            earlier = self._earlier(job) if self._resume else None
            if earlier is not None and earlier.finished:
                self._listener.job_ended(job, earlier, "kept from an earlier run")
                continue
            limit = clock() + (end - clock()) / (len(jobs) - index)
            try:
                record, note, finished = self._search(job, limit, earlier)
            except KeyboardInterrupt:
                record, note, finished = None, "interrupted before anything was measured", False
            if record is not None:
                save(record)
            self._listener.job_ended(job, record, note)
            if not finished:
                return False
        return True

    def _earlier(self, job: Job) -> Record | None:
        machine = self._machine
        try:
            return read_result(path_of(machine.arch, machine.name, job.variant, job.case.size))
        except (RecordError, FileNotFoundError):
            return None

    def _search(self, job: Job, limit: float, earlier: Record | None) -> tuple[Record | None, str, bool]:
        """Search one job; a record to store, a note, and whether the search came to its end."""
        default = default_config(arch_key(self._machine.arch))
        try:
            bench = self._tools.bench(job)
        except torch.OutOfMemoryError:
            return None, "its tensors do not fit the device", True
        outcomes: dict[LaunchConfig, str] = {}

        def viable(configs: Sequence[LaunchConfig]) -> list[LaunchConfig]:
            return self._prune(job.variant, configs, limit, outcomes)

        search = Search(bench, default, self._tools.clock, limit, self._listener.progressed, _settled_by(earlier))
        result = search.run(
            viable(shapes(self._machine.processor.warp_size)),
            lambda best: viable([config for shape in best for config in refinements(shape)]),
        )
        result.outcomes = {**outcomes, **result.outcomes}
        wrong = [outcome for outcome in result.outcomes.values() if outcome.startswith(WRONG)]
        note = f"{len(wrong)} wrong candidates, the first: {wrong[0].removeprefix(WRONG)}" if wrong else ""
        if result.config is None:
            return None, result.reason, result.finished
        if not result.repetitions:
            return None, note or "the time was up before anything was measured", result.finished
        return self._record(job, bench, result, default), note, result.finished

    def _prune(
        self,
        variant: Variant,
        configs: Sequence[LaunchConfig],
        limit: float,
        outcomes: dict[LaunchConfig, str],
    ) -> list[LaunchConfig]:
        """Candidates that the compiler has nothing against, best first; those it has go to `outcomes`."""
        clock, facts = self._tools.clock, self._facts.setdefault(variant, {})
        missing = [form for form in distinct(map(compiled_form, configs)) if form not in facts]
        end = clock() + COMPILE_SHARE * (limit - clock())
        if missing:
            for config, found in self._tools.compiler.compile(variant, missing, self._machine.arch):
                facts[config] = found
                if clock() > end:
                    break
        ranked = rank(configs, facts, self._limits)
        outcomes.update({entry.config: entry.dropped for entry in ranked if entry.dropped})
        outcomes.update({config: NOT_COMPILED for config in configs if compiled_form(config) not in facts})
        return [entry.config for entry in ranked if entry.dropped is None]

    def _record(self, job: Job, bench: TimedBench, result: SearchResult, default: LaunchConfig) -> Record | None:
        config, baseline = result.config, result.summary(default)
        best = None if config is None else result.summary(config)
        if config is None or best is None or baseline is None:
            return None
        # An infinite noise is JSON's problem: nothing was decided, and the reason says so.
        noise = min(result.gain.noise, 1.0)
        trials = [
            Trial(candidate, outcome, result.summary(candidate)) for candidate, outcome in result.outcomes.items()
        ]
        return Record(
            basis=MEASURED,
            arch=self._machine.arch,
            device=self._machine.name,
            variant=job.variant,
            size=job.case.size,
            case=job.case.name,
            config=config,
            reason=result.reason,
            kernel_hash=kernel_hash(job.variant.algorithm),
            versions=versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            finished=result.finished,
            times=Times(best, baseline, result.gain.gain, noise, bench.copy_ms(), bench.nbytes),
            trials=tuple(trials),
        )


def _settled_by(earlier: Record | None) -> dict[LaunchConfig, str]:
    """Candidates that an interrupted search had already lost: a time next to the default's stays a comparison."""
    if earlier is None:
        return {}
    return {trial.config: trial.outcome for trial in earlier.trials if trial.outcome.startswith((SLOWER, WRONG))}
