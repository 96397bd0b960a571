"""How a kernel is launched: everything about a launch that changes its speed and never its result."""

from __future__ import annotations

from dataclasses import dataclass

from dragon.kernels.archs import arch_name, warp_size
from dragon.kernels.constant import Constant
from dragon.kernels.spec import Spec, has_blocks


@dataclass(frozen=True)
class LaunchConfig(Constant):
    """The tuning of an update kernel, compiled into it.

    Attributes:
        chunk: elements that a program takes at a time, a power of two and no fewer than its threads.
        n_warps: warps of a program.
        n_stages: software pipelining stages of loops.
        eviction: cache hint of loads and stores: "", "evict_first" or "evict_last".
        programs_per_processor: with a persistent grid, programs for each multiprocessor; 0 for a program a chunk.
    """

    chunk: int = 1024
    n_warps: int = 4
    n_stages: int = 1
    eviction: str = ""
    programs_per_processor: int = 0


# 1024 elements on 4 warps are 8 a thread: one 16-byte access of bf16, two of fp32, and 56 registers on sm_90,
# where 2048 take 96 (triton 3.7.1).
DEFAULT_CONFIG = LaunchConfig()

# The maximum of a block is met in shared memory, where warps wait for each other: fewer of them are up to 5 %
# faster on an H100.
BLOCK_CONFIG = LaunchConfig(chunk=512, n_warps=2)

# A warp of CDNA has 64 threads: 1024 elements would leave 4 of them a thread, an access of 8 bytes for bf16.
WIDE_WARP_CONFIG = LaunchConfig(chunk=2048)

# Interpreted programs run one after the other, and an operation of NumPy takes much longer to start than to do.
INTERPRETER_CONFIG = LaunchConfig(chunk=4096)


def default_config(arch: str, spec: Spec | None = None) -> LaunchConfig:
    """The configuration that nothing is measured for.

    Args:
        arch: the architecture, such as "sm_90", "90" or "gfx942".
        spec: which kernel; None for one without blocks that share a scale.
    """
    name = arch_name(arch)
    if name == "cpu":
        return INTERPRETER_CONFIG
    if warp_size(name) == 64:
        return WIDE_WARP_CONFIG
    return DEFAULT_CONFIG if spec is None or not has_blocks(spec) else BLOCK_CONFIG
