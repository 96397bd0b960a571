"""Measure a case: make it, check every contender, let them take turns, and say what came of each."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import environment
from benchmarks.cases import Case, Precision
from benchmarks.checks import Expected, check
from benchmarks.contenders import Contender, UnsupportedError
from benchmarks.records import SKIPPED, TIMED, WRONG, Record
from benchmarks.timing import Entry, Spread, Turn, take_turns
from benchmarks.workload import Origin, Workload, make_origin

COPY = "copy_"

# A copy moves at most this many bytes: by then its bandwidth no longer depends on them.
MOST_COPIED = 2**30

N_WARM_UP = 1


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
    """

    device: torch.device
    n_rounds: int
    budget_s: float
    environment: dict[str, Any]
    note: str | None = None
    on_progress: Callable[[str], object] = lambda text: None


@dataclass(frozen=True)
class Ready:
    """A contender that passed its check, warm."""

    contender: Contender
    workload: Workload
    entry: Entry
    error: float | None
    n_launches: float | None


def measure(
    run: Run, case: Case, precision: Precision, contenders: Sequence[Contender], reason: str | None = None
) -> Iterator[Record]:
    """Measure contenders on a case, those at a time that fit the memory beside each other.

    Args:
        run: what is the same for all cases.
        case: what to measure.
        precision: in which dtypes.
        contenders: whom.
        reason: why nothing of it is to be measured.

    Yields:
        One record for each contender, and one for the copy that bandwidths are compared with.
    """
    base = Record(case.name, precision.name, "", SKIPPED, run.environment, note=run.note)
    takers = []
    for contender in contenders:
        why_not = reason or contender.why_not(case)
        if why_not is None:
            takers.append(contender)
        else:
            yield replace(base, contender=contender.name, reason=why_not)
    if not takers:
        return
    references, others = _split(takers)
    _release(run.device)
    held = {contender.name: contender.nbytes_held(case, precision) for contender in takers}
    fixed = 2 * precision.param.itemsize + sum(held[contender.name] for contender in references)
    free = environment.free_nbytes(run.device) - MOST_COPIED
    largest = max((held[contender.name] for contender in others), default=0)
    try:
        case = case.fit(free / (fixed + largest))
    except ValueError as error:
        for contender in takers:
            yield replace(base, contender=contender.name, reason=f"the case does not fit: {error}")
        return
    base = _describe(base, case)
    origin = make_origin(case, precision, run.device)
    expected = Expected(origin)
    for index, batch in enumerate(_batches(others, held, free / case.numel - fixed)):
        _release(run.device)
        records = list(_measure_batch(run, origin, expected, [*references, *batch], base))
        # A later batch measures the references again, for its ratios only.
        known = {contender.name for contender in references} | {COPY} if index else set()
        yield from (record for record in records if record.contender not in known)


def _release(device: torch.device) -> None:
    """Give back the memory of contenders that have been measured."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled steps hold their tensors
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _split(contenders: Sequence[Contender]) -> tuple[list[Contender], list[Contender]]:
    """Those that others' ratios are to, and the others."""
    named = {contender.reference for contender in contenders}
    references = [contender for contender in contenders if contender.name in named]
    return references, [contender for contender in contenders if contender.name not in named]


def _batches(contenders: Sequence[Contender], held: dict[str, float], free: float) -> list[list[Contender]]:
    """Divide contenders so that each part fits into `free` bytes a parameter; at least one part."""
    batches: list[list[Contender]] = [[]]
    used = 0.0
    for contender in contenders:
        if batches[-1] and used + held[contender.name] > free:
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
        new_grads=case.new_grads,
    )


def _measure_batch(
    run: Run, origin: Origin, expected: Expected, contenders: Sequence[Contender], base: Record
) -> Iterator[Record]:
    """Check and time contenders beside each other."""
    ready: list[Ready] = []
    for contender in contenders:
        run.on_progress(f"{origin.case.name}, {origin.precision.name}: checking {contender.name}")
        made = _prepare(run, origin, expected, contender, replace(base, contender=contender.name))
        if isinstance(made, Record):
            yield made
        else:
            ready.append(made)
    if not ready:
        return
    entries = {one.contender.name: one.entry for one in ready}
    copied, copy = _copy_entry(ready, origin)
    pace = next((entries[one.contender.reference] for one in ready if one.contender.reference in entries), copy)
    run.on_progress(f"{origin.case.name}, {origin.precision.name}: {len(ready)} contenders take turns")
    take_turns([copy, *entries.values()], pace, origin.device, run.n_rounds, run.budget_s)
    clock = "total_ms" if origin.device.type == "cpu" else "device_ms"
    copy_gb_per_s = copied / Spread.of(copy.samples(clock)).median / 1e6
    yield _timed(replace(base, contender=COPY, gb_per_s=copy_gb_per_s), copy, None)
    for one in ready:
        yield _result(one, entries, origin, copy_gb_per_s, replace(base, contender=one.contender.name))


def _prepare(run: Run, origin: Origin, expected: Expected, contender: Contender, base: Record) -> Ready | Record:
    """Build, check and warm up a contender; the record says why not."""
    error, n_launches = None, None
    try:
        workload = Workload(origin)
        with contender.context() as launches:
            step = contender.build(workload)
            if not contender.host_only:
                error = check(workload, step, expected)
            for _ in range(N_WARM_UP):
                workload.before_step()
                step()
            if launches is not None:
                before = launches.n_calls
                step()
                n_launches = launches.n_calls - before
        reason = contender.verify(workload)
    except UnsupportedError as unsupported:
        reason = str(unsupported)
    except Exception as failure:  # whatever a contender raises is its reason
        reason = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
    if reason is not None:
        return replace(base, reason=reason)
    if error is not None and not error <= contender.tolerance_for(origin.precision):
        reason = f"off by {error:.3g} learning rates a step, allowed {contender.tolerance_for(origin.precision):g}"
        return replace(base, status=WRONG, reason=reason, error=error)
    entry = Entry(contender.name, step, workload.before_step, contender.context)
    return Ready(contender, workload, entry, error, n_launches)


def _copy_entry(ready: Sequence[Ready], origin: Origin) -> tuple[int, Entry]:
    """Bytes moved, and a `copy_` that moves as many as a step of the first contender, within reason."""
    per_param = ready[0].contender.nbytes_per_param(origin.case, origin.precision, origin.device)
    nbytes = max(2, int(min(MOST_COPIED, per_param * origin.case.numel))) // 2
    source = torch.ones(nbytes, dtype=torch.uint8, device=origin.device)
    # The system hands out memory when it is first written, which is not to be measured.
    target = source.clone()
    return 2 * nbytes, Entry(COPY, lambda: target.copy_(source))


def _timed(record: Record, entry: Entry, reference: Entry | None, host_only: bool = False) -> Record:
    """The record with the entry's times."""
    total, host, device, cold = (
        Spread.of(samples) if (samples := entry.samples(c)) else None for c in Turn._fields
    )
    clock = "total_ms"
    if host_only:
        clock = "total_ms" if host is None else "host_ms"
        total, host, device = None, host or total, None
    ratios = entry.ratios_to(reference, clock) if reference is not None else []
    ratio = Spread.of(ratios) if ratios else None
    return replace(record, status=TIMED, ratio=ratio, total_ms=total, host_ms=host, device_ms=device, cold_ms=cold)


def _result(one: Ready, entries: dict[str, Entry], origin: Origin, copy_gb_per_s: float, base: Record) -> Record:
    contender = one.contender
    record = replace(base, error=one.error, n_launches=one.n_launches, reference=contender.reference)
    record = _timed(record, one.entry, entries.get(contender.reference), contender.host_only)
    if contender.host_only:
        return record
    per_param = contender.nbytes_per_param(origin.case, origin.precision, origin.device)
    busy = record.device_ms or record.total_ms
    assert busy is not None
    gb_per_s = per_param * origin.case.numel / busy.median / 1e6
    return replace(record, nbytes_per_param=per_param, gb_per_s=gb_per_s, share_of_copy=gb_per_s / copy_gb_per_s)
