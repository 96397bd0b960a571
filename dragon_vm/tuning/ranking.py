"""What the compiler's facts say about candidates before any is timed: which to drop, and which look best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning.candidates import compiled_form, describe


class Facts(NamedTuple):
    """What the compiler made of one configuration.

    Attributes:
        registers: a thread.
        spilled_nbytes: local memory a thread.
        shared_nbytes: shared memory a program.
        is_vectorized: whether every access of the vector path is at least 16 bytes wide.
        loaded_nbytes: that a thread loads in one pass of the vector path.
        instructions: of the vector path, an element.
    """

    registers: int
    spilled_nbytes: int
    shared_nbytes: int
    is_vectorized: bool
    loaded_nbytes: int
    instructions: float


class Limits(NamedTuple):
    """What a multiprocessor (a compute unit, on AMD) has.

    Attributes:
        registers: for threads to share.
        granule: in which a warp's registers are allotted.
        n_warps: resident at most.
        n_programs: resident at most.
        shared_nbytes: shared memory for programs to share.
        reserved_nbytes: shared memory that the driver takes of each program.
        warp_size: threads of a warp.
    """

    registers: int
    granule: int
    n_warps: int
    n_programs: int
    shared_nbytes: int
    reserved_nbytes: int
    warp_size: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability":
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
_CUDA = Limits(65536, 256, 64, 32, 228 * 1024, 1024, 32)
_CUDA_LIMITS = {
    "sm_75": _CUDA._replace(n_warps=32, n_programs=16, shared_nbytes=64 * 1024, reserved_nbytes=0),
    "sm_80": _CUDA._replace(shared_nbytes=164 * 1024),
    "sm_86": _CUDA._replace(n_warps=48, n_programs=16, shared_nbytes=100 * 1024),
    "sm_87": _CUDA._replace(n_warps=48, n_programs=16, shared_nbytes=164 * 1024),
    "sm_89": _CUDA._replace(n_warps=48, n_programs=24, shared_nbytes=100 * 1024),
    "sm_120": _CUDA._replace(n_warps=48, n_programs=24, shared_nbytes=100 * 1024),
}
# CDNA3: four SIMDs, each with 512 registers a lane and 8 waves of 64 threads.
# https://rocm.docs.amd.com/en/latest/reference/gpu-arch-specs.html
_CDNA = Limits(4 * 512 * 64, 8 * 64, 32, 32, 64 * 1024, 0, 64)
# RDNA3: four SIMDs, each with 1536 registers a lane and 16 waves of 32 threads.
_RDNA = Limits(4 * 1536 * 32, 24 * 32, 64, 32, 64 * 1024, 0, 32)

# With fewer warps than this on a multiprocessor nothing hides the latency of a tensor's last chunk.
FEWEST_WARPS = 8


def limits_of(arch: str) -> Limits:
    """Limits of an architecture; an unknown CUDA one is taken for a data centre's."""
    if arch.startswith("gfx9"):
        return _CDNA
    return _RDNA if arch.startswith("gfx") else _CUDA_LIMITS.get(arch, _CUDA)


def resident_warps(config: LaunchConfig, facts: Facts, limits: Limits) -> int:
    """Warps that fit a multiprocessor at the same time."""
    threads_registers = facts.registers * limits.warp_size
    warp_registers = max(-(-threads_registers // limits.granule), 1) * limits.granule
    by_registers = limits.registers // warp_registers // config.n_warps
    by_shared_memory = limits.shared_nbytes // max(facts.shared_nbytes + limits.reserved_nbytes, 1)
    n_programs = min(by_registers, by_shared_memory, limits.n_warps // config.n_warps, limits.n_programs)
    return n_programs * config.n_warps


def nbytes_in_flight(config: LaunchConfig, facts: Facts, limits: Limits) -> int:
    """Bytes that the resident warps of a multiprocessor can have asked memory for."""
    return resident_warps(config, facts, limits) * limits.warp_size * facts.loaded_nbytes


def why_dropped(config: LaunchConfig, facts: Facts, limits: Limits) -> str | None:
    """Why a configuration is not worth timing; None if it is."""
    if facts.spilled_nbytes:
        return f"spills {facts.spilled_nbytes} bytes a thread"
    if not facts.is_vectorized:
        return "no 16-byte path"
    n_warps = resident_warps(config, facts, limits)
    if n_warps < FEWEST_WARPS:
        taken = f"{facts.registers} registers a thread and {facts.shared_nbytes} bytes of shared memory"
        return f"{taken}: {n_warps} warps fit a multiprocessor"
    return None


class Ranked(NamedTuple):
    """A candidate with what the compiler says of it.

    Attributes:
        config: the candidate.
        facts: None if it does not compile.
        dropped: why it is not worth timing, None if it is.
    """

    config: LaunchConfig
    facts: Facts | None
    dropped: str | None


def rank(
    configs: Sequence[LaunchConfig], facts: Mapping[LaunchConfig, Facts | str], limits: Limits
) -> list[Ranked]:
    """Order candidates by what the compiler says, those to drop last.

    The order is of memory parallelism: most bytes in flight, then most warps, then fewest instructions an
    element. It is no forecast of a time.

    Args:
        configs: candidates.
        facts: by `compiled_form`; a text says why one does not compile. A candidate without facts is not compiled
            yet, and left out.
        limits: of the architecture.
    """
    known = [config for config in configs if compiled_form(config) in facts]
    ranked = [_judge(config, facts, limits) for config in known]

    def key(entry: Ranked) -> tuple[bool, int, int, float]:
        if entry.facts is None:
            return (True, 0, 0, 0.0)
        in_flight = nbytes_in_flight(entry.config, entry.facts, limits)
        warps = resident_warps(entry.config, entry.facts, limits)
        return (entry.dropped is not None, -in_flight, -warps, entry.facts.instructions)

    return sorted(ranked, key=key)


def _judge(config: LaunchConfig, facts: Mapping[LaunchConfig, Facts | str], limits: Limits) -> Ranked:
    found = facts[compiled_form(config)]
    if isinstance(found, str):
        return Ranked(config, None, f"does not compile: {found}")
    if config.n_stages > 1:
        plain = replace(compiled_form(config), n_stages=1)
        if facts.get(plain) == found:
            return Ranked(config, found, f"the same code as {describe(plain)}")
    return Ranked(config, found, why_dropped(config, found, limits))
