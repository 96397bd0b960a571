"""Candidate configurations: chunk sizes and warps first, then hints and grids for the best of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

from dragon.kernels.config import LaunchConfig
from dragon.kernels.spec import Spec
from dragon.vm.torch.optim._backends.configs import EVICTIONS

CHUNKS = (512, 1024, 2048, 4096, 8192)
WARPS = (2, 4, 8, 16)
STAGES = (1, 2)
PROGRAMS_PER_PROCESSOR = (0, 2, 4, 8)

# Elements of a thread: fewer than 4 of fp32 are no 16-byte access, more than 32 do not fit the registers.
FEWEST_ELEMENTS, MOST_ELEMENTS = 4, 32

# Each process holds a compiler of its own.
MOST_PROCESSES = 16

LATE = "not compiled in time"


def shapes(warp_size: int) -> list[LaunchConfig]:
    """Chunk sizes and warps, everything else as in the default."""
    return [
        LaunchConfig(chunk=chunk, n_warps=n_warps)
        for chunk in CHUNKS
        for n_warps in WARPS
        if FEWEST_ELEMENTS <= chunk / (n_warps * warp_size) <= MOST_ELEMENTS
    ]


def refinements(shape: LaunchConfig) -> Iterator[LaunchConfig]:
    """The other configurations of a shape: cache hints, persistent grids and the stages of their loop."""
    for programs in PROGRAMS_PER_PROCESSOR:
        for n_stages in STAGES if programs else STAGES[:1]:
            for eviction in EVICTIONS:
                config = replace(shape, n_stages=n_stages, eviction=eviction, programs_per_processor=programs)
                if config != shape:
                    yield config


def describe(config: LaunchConfig) -> str:
    """A configuration in a few words."""
    stages = f"{config.n_stages} stages" if config.n_stages > 1 else ""
    persistent = f"{config.programs_per_processor} persistent" if config.programs_per_processor else ""
    return " ".join(filter(None, (f"{config.chunk}/{config.n_warps}", stages, config.eviction, persistent)))


def compile_verdict(spec: Spec, config: LaunchConfig, arch: str) -> str | None:
    """Why a configuration is not worth timing, by the compiler alone; None if it is."""
    from dragon.kernels.inspect import compile_update

    try:
        report = compile_update(spec, config, arch)
    # Whatever a compiler raises is the verdict.
    except Exception as error:
        return f"does not compile: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if report.spilled_nbytes:
        return f"spills {report.spilled_nbytes} bytes a thread"
    return None if report.is_vectorized else "no 16-byte path"


def compile_all(
    spec: Spec, configs: Sequence[LaunchConfig], arch: str, timeout_s: float
) -> dict[LaunchConfig, str | None]:
    """Verdicts of configurations by a pool of processes; `LATE` for those that take too long."""
    found: dict[LaunchConfig, str | None] = dict.fromkeys(configs, LATE)
    # Processes of their own, because a compiler may crash; spawned, because a CUDA context cannot be forked.
    pool = futures.ProcessPoolExecutor(min(os.cpu_count() or 1, MOST_PROCESSES), get_context("spawn"))
    try:
        repeated = [spec] * len(configs), configs, [arch] * len(configs)
        verdicts = pool.map(compile_verdict, *repeated, timeout=timeout_s)
        for config, reason in zip(configs, verdicts, strict=True):
            found[config] = reason
    except futures.TimeoutError:
        pass
    except BrokenProcessPool:
        found.update({c: "the compiler died" for c, reason in found.items() if reason == LATE})
    finally:
        # `map` has cancelled what it does not wait for any more.
        pool.shutdown(wait=False)
    return found
