"""A tuning run: each job is compiled, checked, searched and stored, within one budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import median
from typing import NamedTuple

import torch

from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.spec import Spec
from dragon.vm._words import counted
from dragon.vm.measuring.machine import INTERPRETER, Machine, versions
from dragon.vm.measuring.timer import Spread, Timer
from dragon.vm.torch.optim._backends.configs import SCHEMA, kernel_hash, spec_fields
from dragon.vm.tuning.candidates import compile_all, describe, shapes
from dragon.vm.tuning.check import check_candidate
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.scratch import Tables, allocate, nbytes_per_element
from dragon.vm.tuning.search import Decision, Search
from dragon.vm.tuning.store import Result, save

# Of a job's time, for compiling its shapes ahead.
COMPILE_SHARE = 0.15

COPY_REPETITIONS = 21

# Bytes: the scratch tensors are still there, and beyond this a copy twice as large takes twice as long.
LARGEST_COPY = 2**29


class KernelBench:
    """The bench of one job on a device.

    Args:
        job: kernel and tensors.
        machine: the device.
        timer: of the device.
        verdicts: known checks of the kernel's configurations; a check does not depend on the tensors.

    Raises:
        torch.OutOfMemoryError: if the tensors do not fit the device.
    """

    def __init__(self, job: Job, machine: Machine, timer: Timer, verdicts: dict[LaunchConfig, str | None]) -> None:
        self._spec, self._machine, self._timer, self._verdicts = job.spec, machine, timer, verdicts
        rows = allocate(job.spec, job.numels, machine.device)
        self._tables = Tables(rows, job.spec, machine)
        self.nbytes = nbytes_per_element(job.spec) * sum(job.numels)

    def check(self, config: LaunchConfig) -> str | None:
        """Why a configuration's result is wrong; None if it is right."""
        if config not in self._verdicts:
            self._verdicts[config] = check_candidate(self._spec, config, self._machine)
        return self._verdicts[config]

    def time_ms(self, configs: Sequence[LaunchConfig]) -> list[float]:
        """One time of each configuration; in place and on scratch memory, so a step is as good as any."""
        return self._timer.device_ms([self._tables.launch(config) for config in configs])

    def copy_ms(self) -> float:
        """The time of a `copy_` that reads and writes as many bytes as a launch; a very large one is scaled up."""
        n_copied = max(min(self.nbytes // 2, LARGEST_COPY), 1)
        source = torch.zeros(n_copied, dtype=torch.int8, device=self._machine.device)
        target = torch.empty_like(source)
        times = self._timer.device_ms([lambda: target.copy_(source)] * COPY_REPETITIONS)
        return median(times) * self.nbytes / (2 * n_copied)


class Tools(NamedTuple):
    """What a run works with; replaced in tests.

    Attributes:
        bench: makes the bench of a job.
        prune: why configurations of a kernel are not worth timing, in at most so many seconds.
        clock: seconds.
    """

    bench: Callable[[Job], KernelBench]
    prune: Callable[[Spec, Sequence[LaunchConfig], float], dict[LaunchConfig, str | None]]
    clock: Callable[[], float] = time.monotonic


def tools_of(machine: Machine) -> Tools:
    """Tools that measure on a device; nothing is compiled for triton's interpreter."""
    timer = Timer(machine.device)
    known: dict[Spec, dict[LaunchConfig, str | None]] = {}

    def prune(spec: Spec, configs: Sequence[LaunchConfig], seconds: float) -> dict[LaunchConfig, str | None]:
        if machine is INTERPRETER:
            return dict.fromkeys(configs)
        return compile_all(spec, configs, machine.arch, seconds)

    return Tools(lambda job: KernelBench(job, machine, timer, known.setdefault(job.spec, {})), prune)


def run(
    jobs: Sequence[Job], budget: float, machine: Machine, tools: Tools, say: Callable[[str], object]
) -> list[Result]:
    """Run the jobs in `budget` seconds, the time that is left shared evenly among those that are left.

    Args:
        jobs: what to tune; each result is stored when its job is done.
        budget: seconds.
        machine: the device.
        tools: of the device.
        say: called with a line for each job.
    """
    results, pruned = [], dict[Spec, dict[LaunchConfig, str | None]]()
    end = tools.clock() + budget
    for index, job in enumerate(jobs):
        start = tools.clock()
        seconds = (end - start) / (len(jobs) - index)
        if job.spec not in pruned:
            pruned[job.spec] = tools.prune(job.spec, shapes(machine.warp_size), COMPILE_SHARE * seconds)
        try:
            result = _run_job(job, pruned[job.spec], machine, tools, start + seconds, say)
        # The scratch tensors, or those that a copy is timed with.
        except torch.OutOfMemoryError:
            say(f"{job.name}, {job.size}: its tensors do not fit the device")
            continue
        if result is not None:
            save(result)
            results.append(result)
            say(summary(result))
    return results


def _run_job(
    job: Job,
    pruned: dict[LaunchConfig, str | None],
    machine: Machine,
    tools: Tools,
    limit: float,
    say: Callable[[str], object],
) -> Result | None:
    """The result of one job, whose tensors are then freed; None if there is nothing to store.

    Raises:
        torch.OutOfMemoryError: if the tensors do not fit the device.
    """
    bench = tools.bench(job)
    search = Search(bench, default_config(machine.arch, job.spec), tools.clock, limit)
    decision = search.run([config for config, reason in pruned.items() if reason is None])
    decision.outcomes.update({config: reason for config, reason in pruned.items() if reason is not None})
    wrong = [text for text in decision.outcomes.values() if text.startswith("wrong")]
    if wrong:
        say(f"{job.name}, {job.size}: {counted(len(wrong), 'wrong configuration')}, the first: {wrong[0]}")
    if decision.config is None or not decision.repetitions:
        say(f"{job.name}, {job.size}: nothing is stored: {decision.reason}")
        return None
    return _result(job, bench, decision, machine)


def _result(job: Job, bench: KernelBench, decision: Decision, machine: Machine) -> Result:
    """What is stored: the decision, what it is of, and what it rests on."""
    default = default_config(machine.arch, job.spec)
    assert decision.config is not None
    trials = [
        {"config": asdict(config), "outcome": outcome, "median_ms": median(times) if times else None}
        for config, outcome in decision.outcomes.items()
        for times in [decision.times(config)]
    ]
    return {
        "schema": SCHEMA,
        "kernel": job.name,
        "spec": spec_fields(job.spec),
        "size": job.size,
        "arch": machine.arch,
        "device": machine.name,
        "config": asdict(decision.config),
        "reason": decision.reason,
        "kernel_hash": kernel_hash(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "best_ms": Spread.of(decision.times(decision.config))._asdict(),
        "default_ms": Spread.of(decision.times(default))._asdict(),
        "copy_ms": bench.copy_ms(),
        "nbytes": bench.nbytes,
        "trials": trials,
    }


def summary(result: Result) -> str:
    """A result in a line."""
    best, default = result["best_ms"]["median"], result["default_ms"]["median"]
    return (
        f"{result['kernel']}, {result['size']}: {describe(LaunchConfig(**result['config']))}: {best:.4f} ms, "
        f"default {default:.4f} ms, {result['copy_ms'] / best:.0%} of copy_: {result['reason']}"
    )
