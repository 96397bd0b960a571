"""Which configurations are worth a look: shapes first, then hints and grids for the best shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from dragon.kernels.config import LaunchConfig

CHUNKS = (512, 1024, 2048, 4096, 8192)
WARPS = (2, 4, 8, 16)
STAGES = (1, 2)
EVICTIONS = ("", "evict_first", "evict_last")
PROGRAMS_PER_PROCESSOR = (0, 2, 4, 8)

# Elements of a thread: fewer than 4 of fp32 are no 16-byte access, more than 32 do not fit the registers.
FEWEST_ELEMENTS, MOST_ELEMENTS = 4, 32


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


def compiled_form(config: LaunchConfig) -> LaunchConfig:
    """One configuration for all that the compiler gives the same resources.

    A persistent grid's size is no constant of the kernel. Cache hints are a suffix of the accesses: they change
    neither their width nor a register (triton 3.7.1, sm_90).
    """
    return replace(config, eviction="", programs_per_processor=min(config.programs_per_processor, 1))


def describe(config: LaunchConfig) -> str:
    """A configuration in a few words."""
    parts = [f"{config.chunk}/{config.n_warps}"]
    if config.n_stages > 1:
        parts.append(f"{config.n_stages} stages")
    if config.eviction:
        parts.append(config.eviction)
    if config.programs_per_processor:
        parts.append(f"{config.programs_per_processor} persistent")
    return " ".join(parts)


def distinct(configs: Iterable[LaunchConfig]) -> list[LaunchConfig]:
    """Each configuration once, in order of first appearance."""
    return list(dict.fromkeys(configs))
