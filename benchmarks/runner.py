"""Measure a case: make it, check every contender, let them take turns, and say what came of each."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import environment
from benchmarks.cases import Case, Precision
from benchmarks.checks import Expected, check
from benchmarks.contenders import TORCH_FUSED, Contender, UnsupportedError
from benchmarks.records import FAILED, SKIPPED, TIMED, WRONG, Record
from benchmarks.timing import FEWEST_ROUNDS, Entry, take_turns
from benchmarks.workload import Origin, Workload, make_origin
from dragon.vm.measuring.timer import Spread, Timer

COPY = "copy_"

# A copy moves at most this many bytes: by then its bandwidth no longer depends on them.
MOST_COPIED = 2**30

N_WARM_UP = 1
# What is prepared for sets of gradients takes more of them.
N_WARM_UP_CHANGING = 20


@dataclass(frozen=True)
class Run:
    """What is the same for all cases.

    Attributes:
        device: of the tensors.
        n_rounds: turns of each contender, at most.
        budget_s: seconds of turns for each contender in each case.
        environment: see `benchmarks.environment.describe`.
        note: recorded with every measurement.
        on_progress: called with a description whenever something begins.
        on_records: called with the records that there are after the first rounds, and again with the final ones.
    """

    device: torch.device
    n_rounds: int
    budget_s: float
    environment: dict[str, Any]
    note: str | None = None
    on_progress: Callable[[str], object] = lambda text: None
    on_records: Callable[[list[Record]], object] = lambda records: None


@dataclass(frozen=True)
class Ready:
    """A contender that passed its check, warm."""

    contender: Contender
    entry: Entry
    error: float


def measure(
    run: Run, case: Case, precision: Precision, contenders: Sequence[Contender], reason: str | None = None
) -> list[Record]:
    """Measure contenders on a case, those at a time that fit the memory beside each other, slow ones last.

    Args:
        run: what is the same for all cases.
        case: what to measure.
        precision: in which dtypes.
        contenders: whom; torch's fused Adam, if it is among them, takes part in all turns.
        reason: why nothing of it is to be measured.

    Returns:
        One record for each contender, and one for the copy that bandwidths are compared with.
    """
    base = Record(case.name, precision.name, "", SKIPPED, run.environment, note=run.note, reference=TORCH_FUSED)
    takers, records = [], []
    for contender in contenders:
        why_not = reason or contender.why_not(case, precision, run.device)
        if why_not is None:
            takers.append(contender)
        else:
            records.append(replace(base, contender=contender.name, reason=why_not))
    _release(run.device)
    references = [contender for contender in takers if contender.name == TORCH_FUSED]
    others = [contender for contender in takers if contender.name != TORCH_FUSED]
    held = {contender.name: contender.nbytes_held(case, precision) for contender in takers}
    # The origin, and the reference beside each batch of others.
    fixed = 2 * precision.param.itemsize + sum(held[contender.name] for contender in references)
    free = environment.free_nbytes(run.device) - MOST_COPIED
    try:
        case = case.fit(free / (fixed + max((held[contender.name] for contender in others), default=0)))
    except ValueError as error:
        records += [
            replace(base, contender=taker.name, reason=f"the case does not fit: {error}") for taker in takers
        ]
        takers = []
    run.on_records(list(records))
    if not takers:
        return records
    base = _describe(base, case)
    origin = make_origin(case, precision, run.device)
    expected, timer = Expected(origin), Timer(run.device)
    for index, batch in enumerate(_batches(others, held, free / case.numel - fixed)):
        _release(run.device)
        # A later batch measures the reference again, for its ratios only.
        known = {TORCH_FUSED, COPY} if index else set()
        found = _measure_batch(run, origin, expected, [*references, *batch], base, timer, known)
        run.on_records(found)
        records += found
    return records


def _release(device: torch.device) -> None:
    """Give back the memory of contenders that have been measured."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled steps hold their tensors
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _batches(contenders: Sequence[Contender], held: dict[str, float], free: float) -> list[list[Contender]]:
    """Divide contenders so that each part fits into `free` bytes a parameter, slow ones apart, at least one."""
    batches: list[list[Contender]] = [[]]
    used = 0.0
    for contender in sorted(contenders, key=lambda contender: contender.slow):
        last = batches[-1]
        if last and (used + held[contender.name] > free or contender.slow != last[-1].slow):
            batches.append([])
            used = 0.0
        batches[-1].append(contender)
        used += held[contender.name]
    return batches


def _describe(record: Record, case: Case) -> Record:
    return replace(
        record,
        n_tensors=len(case.shapes),
        n_groups=case.n_groups,
        numel=case.numel,
        n_layers=case.n_layers,
        n_layers_of_model=case.n_layers_of_model,
        chain=case.chain,
    )


def _measure_batch(
    run: Run,
    origin: Origin,
    expected: Expected,
    contenders: Sequence[Contender],
    base: Record,
    timer: Timer,
    known: set[str],
) -> list[Record]:
    """Check and time contenders beside each other; records of all but the known ones."""
    ready: list[Ready] = []
    records: list[Record] = []
    for contender in contenders:
        run.on_progress(f"{origin.case.name}, {origin.precision.name}: checking {contender.name}")
        made = _prepare(origin, expected, contender, replace(base, contender=contender.name))
        if isinstance(made, Record):
            records.append(made)
        else:
            ready.append(made)
    if not ready:
        return records
    copied, copy = _copy_entry(ready[0].contender, origin)

    def timed() -> list[Record]:
        found = _results(ready, copied, copy, origin, base)
        return [record for record in records + found if record.contender not in known]

    def on_round(n_done: int) -> None:
        if n_done == FEWEST_ROUNDS:
            run.on_records(timed())

    run.on_progress(f"{origin.case.name}, {origin.precision.name}: {len(ready)} contenders take turns")
    entries = [copy, *(one.entry for one in ready)]
    take_turns(entries, ready[0].entry, timer, run.n_rounds, run.budget_s, on_round)
    return timed()


def _prepare(origin: Origin, expected: Expected, contender: Contender, base: Record) -> Ready | Record:
    """Build, check and warm up a contender; the record says why not."""
    try:
        workload = Workload(origin)
        step = contender.build(workload)
        error = check(workload, step, expected)
        for _ in range(N_WARM_UP_CHANGING if origin.case.changing else N_WARM_UP):
            workload.before_step()
            step()
        if (reason := contender.verify(workload)) is not None:
            return replace(base, status=FAILED, reason=reason)
    except UnsupportedError as unsupported:
        return replace(base, reason=str(unsupported))
    except Exception as failure:  # whatever a contender raises is its reason
        text = str(failure).strip().splitlines()[0] if str(failure).strip() else ""
        return replace(base, status=FAILED, reason=f"{type(failure).__name__}: {text}")
    tolerance = contender.tolerance_for(origin.precision)
    # Written as "not <=" so that a NaN is no pass.
    if not error <= tolerance:
        reason = f"off by {error:.3g} learning rates a step, allowed {tolerance:g}"
        return replace(base, status=WRONG, reason=reason, error=error)
    return Ready(contender, Entry(contender.name, step, workload.before_step), error)


def _copy_entry(contender: Contender, origin: Origin) -> tuple[int, Entry]:
    """Bytes moved, and a `copy_` that moves as many as a step of a contender, within reason."""
    per_param = contender.nbytes_per_param(origin.case, origin.precision, origin.device)
    nbytes = max(2, int(min(MOST_COPIED, per_param * origin.case.numel))) // 2
    source = torch.ones(nbytes, dtype=torch.uint8, device=origin.device)
    # The system hands out memory when it is first written, which is not to be measured.
    target = source.clone()
    return 2 * nbytes, Entry(COPY, lambda: target.copy_(source))


def _results(ready: Sequence[Ready], copied: int, copy: Entry, origin: Origin, base: Record) -> list[Record]:
    """A record for the copy and for each contender, of the turns that there are."""
    copy_record = _timed(replace(base, contender=COPY, reference=None), copy, None)
    assert copy_record.busy_ms is not None
    copy_gb_per_s = copied / copy_record.busy_ms.median / 1e6
    found = [replace(copy_record, gb_per_s=copy_gb_per_s)]
    reference = next((one.entry for one in ready if one.contender.name == TORCH_FUSED), None)
    for one in ready:
        record = _timed(replace(base, contender=one.contender.name, error=one.error), one.entry, reference)
        per_param = one.contender.nbytes_per_param(origin.case, origin.precision, origin.device)
        assert record.busy_ms is not None
        gb_per_s = per_param * origin.case.numel / record.busy_ms.median / 1e6
        found.append(
            replace(
                record,
                state_nbytes=one.contender.state_nbytes(origin.precision),
                nbytes_per_param=per_param,
                gb_per_s=gb_per_s,
                share_of_copy=gb_per_s / copy_gb_per_s,
            )
        )
    return found


def _timed(record: Record, entry: Entry, reference: Entry | None) -> Record:
    """The record with the entry's times."""
    cold, host, device, warm = (
        Spread.of(samples) if (samples := entry.samples(clock)) else None
        for clock in ("cold_ms", "host_ms", "device_ms", "warm_ms")
    )
    ratios = entry.ratios_to(reference) if reference is not None else []
    ratio = Spread.of(ratios) if ratios else None
    return replace(record, status=TIMED, ratio=ratio, cold_ms=cold, host_ms=host, device_ms=device, warm_ms=warm)
