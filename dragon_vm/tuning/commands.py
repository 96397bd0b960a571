"""The actions of ``dragon-vm tune``; each prints, and returns an exit status."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from triton import knobs

from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant
from dragon.vm.tuning._fields import RecordError
from dragon.vm.tuning.candidates import shapes
from dragon.vm.tuning.compiler import Compiler, Workers
from dragon.vm.tuning.estimate import Ranking, estimates, rank_variants
from dragon.vm.tuning.identity import arch_name
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.lookup import find, forget, packaged
from dragon.vm.tuning.machine import Machine, present_gpu
from dragon.vm.tuning.progress import ProgressBar
from dragon.vm.tuning.record import MEASURED, Record
from dragon.vm.tuning.run import Tools, TuningRun
from dragon.vm.tuning.scratch import nbytes_per_element
from dragon.vm.tuning.store import check_current, read_bundle, save, scan, tuning_dir, write_bundle
from dragon.vm.tuning.tables import (
    FORCE_HEADINGS,
    JOB_HEADINGS,
    RANKING_HEADINGS,
    RESULT_HEADINGS,
    force_row,
    ignored_lines,
    job_row,
    make_table,
    ranking_rows,
    result_row,
)

NO_GPU = (
    "There is no CUDA or ROCm GPU here to time kernels on; `dragon-vm tune --arch sm_90` compiles and ranks them "
    "for one that is not here."
)

N_BEST = 4


def say(console: Console, *lines: str) -> None:
    """Print text as it is, long paths unbroken."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def tune(
    console: Console, jobs: Sequence[Job], budget: float, resume: bool, tools: Tools, machine: Machine
) -> int:
    """Tune, store and print the results; 1 if interrupted or if nothing could be measured."""
    with ProgressBar(console) as bar:
        finished = TuningRun(machine, tools, bar, resume).run(jobs, budget)
    forget()
    rows = [result_row(job.name, record) for job, record in bar.results]
    if rows:
        console.print(make_table(console, RESULT_HEADINGS, rows))
        say(console, f"{len(rows)} results are in {tuning_dir()}")
    if not finished:
        say(console, "Interrupted: what is measured is kept; `dragon-vm tune --resume` goes on.")
    return 0 if finished and rows else 1


def device_tools(machine: Machine, compiler: Compiler) -> Tools:
    """Tools that measure on a GPU."""
    from dragon.vm.tuning.bench import KernelBench
    from dragon.vm.tuning.timer import DeviceTimer

    timer = DeviceTimer(machine.device)
    verdicts: dict[Variant, dict[LaunchConfig, str | None]] = {}

    def bench(job: Job) -> KernelBench:
        known = verdicts.setdefault(job.variant, {})
        return KernelBench(job.variant, job.case.numels, machine.device, machine.processor, timer, known)

    return Tools(compiler, bench, time.monotonic)


def tune_here(console: Console, jobs: Sequence[Job], budget: float, resume: bool) -> int:
    """Tune on the present GPU; without one say so in a line."""
    machine = present_gpu()
    if machine is None:
        say(console, NO_GPU)
        return 1
    # In the cache of this process's launches, which then need not compile again.
    with Workers(cache=knobs.cache.dir) as workers:
        return tune(console, jobs, budget, resume, device_tools(machine, workers), machine)


def dry_run(console: Console, jobs: Sequence[Job], arch: str | None) -> int:
    """List what would run."""
    machine = present_gpu()
    warp_size = 64 if (arch or "").startswith("gfx9") else 32
    n_shapes = len(shapes(machine.processor.warp_size if machine and arch is None else warp_size))
    rows = [job_row(job, n_shapes, nbytes_per_element(job.variant)) for job in jobs]
    console.print(make_table(console, JOB_HEADINGS, rows))
    target = arch or (machine.name if machine else "no GPU, so nothing would be timed")
    say(console, f"{len(jobs)} searches on: {target}")
    return 0


def rank_for(
    console: Console,
    jobs: Sequence[Job],
    arch: str,
    budget: float,
    export: Path | None,
    compiler: Compiler,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Compile and rank for an architecture that need not be here; export the estimates if asked to."""
    variants = {job.name: job.variant for job in jobs}
    end, rankings = clock() + budget, []
    with console.status("compiling") as status:
        for ranking in rank_variants(
            variants,
            arch,
            compiler,
            lambda: clock() > end,
            lambda name, done, total: status.update(f"{name}: {done} of {total} compiled"),
        ):
            rankings.append(ranking)
    show_all = len(rankings) == 1
    rows = [row for ranking in rankings for row in ranking_rows(ranking, None if show_all else N_BEST)]
    say(
        console,
        f"{arch}, by the compiler alone; place 1 has the most bytes in flight. This is no forecast of a time.",
    )
    console.print(make_table(console, RANKING_HEADINGS, rows))
    if missed := [name for name in variants if name not in {ranking.name for ranking in rankings}]:
        say(console, f"Not reached in {budget:g} s: {', '.join(missed)}")
    records = [record for ranking in rankings for record in estimates(ranking, arch)]
    exported = export is None or _write(console, export, records, "estimates")
    return 1 if missed or not exported or _all_broken(rankings) else 0


def rank_here(console: Console, jobs: Sequence[Job], arch: str, budget: float, export: Path | None) -> int:
    """`rank_for` with this machine's compiler."""
    with Workers() as workers:
        return rank_for(console, jobs, arch, budget, export, workers)


def _all_broken(rankings: Sequence[Ranking]) -> bool:
    return any(all(entry.facts is None for entry in ranking.entries) for ranking in rankings)


def show(console: Console, jobs: Sequence[Job], arch: str | None) -> int:
    """Print what is in force and why, and which files are ignored."""
    machine = present_gpu()
    if arch is None and machine is None:
        say(
            console,
            "There is no GPU here; `dragon-vm tune --show --arch sm_90` shows what another machine would use.",
        )
        return 1
    here = machine if machine is not None and arch in (None, machine.arch) else None
    name, arch = (here.name if here else ""), here.arch if here else arch_name(arch or "")
    rows = [force_row(job.name, job.case.size, find(job.variant, arch, name, job.case.size)) for job in jobs]
    say(console, f"{name or 'any device'}, {arch}; results of this user are in {tuning_dir()}")
    console.print(make_table(console, FORCE_HEADINGS, rows))
    say(console, *ignored_lines(scan()[1]))
    return 0


def export_results(console: Console, path: Path) -> int:
    """Write this user's results to a file; 1 if there are none."""
    results, ignored = scan()
    say(console, *ignored_lines(ignored))
    if not results:
        say(console, f"There are no results in {tuning_dir()}")
        return 1
    return 0 if _write(console, path, [record for _, record in results], "results") else 1


def _write(console: Console, path: Path, records: Sequence[Record], kind: str) -> bool:
    """Export records; whether that was possible."""
    try:
        write_bundle(path, records)
    except (RecordError, OSError) as error:
        say(console, f"{path} is not written: {error}")
        return False
    say(console, f"{len(records)} {kind} are in {path}")
    return True


def import_results(console: Console, path: Path) -> int:
    """Store the measured, current results of an exported file; 1 if there are none."""
    try:
        records = read_bundle(path)
    except (RecordError, OSError) as error:
        say(console, f"{path} is not imported: {error}")
        return 1
    n_stored = 0
    for record in records:
        try:
            _check_importable(record)
        except RecordError as error:
            say(console, f"not imported: {record.case} on {record.device or record.arch}: {error}")
            continue
        save(record)
        n_stored += 1
    forget()
    say(console, f"{n_stored} of {len(records)} results are now in {tuning_dir()}")
    return 0 if n_stored else 1


def _check_importable(record: Record) -> None:
    if record.basis != MEASURED:
        raise RecordError("an estimate, which only the package holds")
    check_current(record)


def plot_results(console: Console, path: Path, arch: str | None) -> int:
    """Write a picture of this user's results, or of what is packaged for an architecture."""
    from dragon.vm.tuning.plot import plot

    records = [record for _, record in scan()[0]] if arch is None else list(packaged(arch))
    try:
        plot(records, path)
    except (ValueError, OSError) as error:
        say(console, str(error))
        return 1
    say(console, f"{path} shows {len(records)} results")
    return 0
