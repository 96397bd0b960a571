"""Host work alone: thread time of steps whose launches are replaced by functions that return at once.

It needs no GPU: kernels that would be launched take CPU tensors, as in triton's interpreter, and nothing is run.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import FP32, Case
from benchmarks.contenders import Step, foreign, ours
from benchmarks.records import TIMED, Record
from benchmarks.workload import Workload, make_origin
from dragon.vm.measuring.shapes import equal
from dragon.vm.measuring.timer import Spread

N_ROUNDS = 150
N_WARM_UP = 3
N_TENSORS = (10, 1000)
NUMEL = 16

REFERENCE = "torch fused-host"

# How the name of a case ends in which gradients stay where they are.
KEPT = "kept gradients"

CONTENDERS: dict[str, Callable[[Workload], Step]] = {
    REFERENCE: foreign(torch.optim.Adam, fused=True),
    "ours native-host": ours(backend="native"),
    "ours native flatten-host": ours(backend="native", flatten=True),
    "ours triton-host": ours(backend="triton"),
}


class Counter:
    """Stands for a kernel or an operation: counts its calls, and does nothing."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __getitem__(self, grid: object) -> Counter:
        return self

    def __call__(self, *args: object, **kwargs: object) -> Counter:
        """Count a call; what triton returns for a launch is launched next time."""
        self.n_calls += 1
        return self

    def warmup(self, *args: object, **kwargs: object) -> None:
        """What is compiled before a first launch is no call."""


@contextmanager
def no_device() -> Iterator[Counter]:
    """Let the kernels of this library and the operations behind torch's fused Adam do nothing; counts them."""
    counter = Counter()
    with ExitStack() as patches:
        for name in ("_fused_adam_", "_foreach_add_"):
            patches.enter_context(mock.patch.object(torch, name, counter))
        if importlib.util.find_spec("triton") is not None:
            _replace_kernels(patches, counter)
        yield counter


def _replace_kernels(patches: ExitStack, counter: Counter) -> None:
    from dragon.kernels import launch

    if not launch.INTERPRETED:
        raise RuntimeError("host work is measured with TRITON_INTERPRET=1, set before triton is imported")
    for name in [name for name in vars(launch) if name.endswith("_kernel")]:
        patches.enter_context(mock.patch.object(launch, name, counter))


def measure_all(n_rounds: int, environment: dict[str, Any], note: str | None = None) -> list[Record]:
    """Measure every contender with few and with many tensors, on one thread.

    Args:
        n_rounds: steps of each contender.
        environment: see `benchmarks.environment.describe`.
        note: recorded with every measurement.

    Raises:
        RuntimeError: if a step calls none of the functions that are replaced: its device work would be measured.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        environment = {**environment, "n_threads": 1}
        return [
            record
            for kept in (False, True)
            for n in N_TENSORS
            for record in measure(n, n_rounds, environment, note, kept=kept)
        ]
    finally:
        torch.set_num_threads(n_threads)


def measure(
    n_tensors: int, n_rounds: int, environment: dict[str, Any], note: str | None = None, *, kept: bool = False
) -> list[Record]:
    """Measure every contender with `n_tensors` tensors, whose gradients are new or `kept`; see `measure_all`."""
    name = f"host, {n_tensors} x {NUMEL}"
    case = Case(f"{name}, {KEPT}" if kept else name, equal(n_tensors, NUMEL), kept=kept)
    origin = make_origin(case, FP32, torch.device("cpu"))
    has_triton = importlib.util.find_spec("triton") is not None
    names = [name for name in CONTENDERS if has_triton or "triton" not in name]
    # Read once, when triton is imported: the triton backend then takes tensors on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    workloads = {name: Workload(origin) for name in names}
    steps = {name: CONTENDERS[name](workloads[name]) for name in names}
    with no_device() as counter:
        for name, step in steps.items():
            before = counter.n_calls
            for _ in range(N_WARM_UP):
                workloads[name].before_step()
                step()
            if counter.n_calls == before:
                raise RuntimeError(f"{name}: a step calls none of the functions that are replaced")
        times = _interleaved_ms(steps, workloads, n_rounds)
    records = []
    for name, own in times.items():
        ratios = [theirs / mine for theirs, mine in zip(times[REFERENCE], own, strict=True)]
        records.append(
            Record(
                case.name,
                FP32.name,
                name,
                TIMED,
                environment,
                note=note,
                n_tensors=n_tensors,
                n_groups=1,
                numel=case.numel,
                host_ms=Spread.of(own),
                reference=REFERENCE,
                ratio=Spread.of(ratios),
            )
        )
    return records


def _interleaved_ms(
    steps: dict[str, Step], workloads: dict[str, Workload], n_rounds: int
) -> dict[str, list[float]]:
    """Thread time of one step of each contender in each round, in random order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(n_rounds):
            for name in order.sample(list(steps), len(steps)):
                workloads[name].before_step()
                start = time.thread_time_ns()
                steps[name]()
                times[name].append((time.thread_time_ns() - start) / 1e6)
    finally:
        gc.enable()
    return times
